// Residency sets (macOS 15): they hold what was added, and keep nothing
// resident.

#include <algorithm>

#include "metal.h"

namespace metalsim {
namespace {

struct ResidencySet : Labelled {
  std::mutex lock;
  std::vector<id> pending, committed;
  ~ResidencySet() {
    for (id allocation : pending) objc_release(allocation);
    for (id allocation : committed) objc_release(allocation);
  }
};

ResidencySet* as_set(id self) { return static_cast<ResidencySet*>(self); }

void set_add(id self, SEL, id allocation) {
  std::lock_guard guard(as_set(self)->lock);
  as_set(self)->pending.push_back(objc_retain(allocation));
}

void set_remove(id self, SEL sel, id allocation) {
  {
    std::lock_guard guard(as_set(self)->lock);
    for (auto* list : {&as_set(self)->pending, &as_set(self)->committed}) {
      auto found = std::find(list->begin(), list->end(), allocation);
      if (found == list->end()) continue;
      list->erase(found);
      objc_release(allocation);
      return;
    }
  }
  fail_assertion(self, sel, "the allocation is not in the set");
}

void set_commit(id self, SEL) {
  ResidencySet* set = as_set(self);
  std::lock_guard guard(set->lock);
  set->committed.insert(set->committed.end(), set->pending.begin(),
                        set->pending.end());
  set->pending.clear();
}

uint64_t set_count(id self, SEL) {
  std::lock_guard guard(as_set(self)->lock);
  return as_set(self)->committed.size() + as_set(self)->pending.size();
}

uint64_t set_size(id self, SEL) {
  static SEL size = sel_registerName("allocatedSize");
  std::lock_guard guard(as_set(self)->lock);
  uint64_t bytes = 0;
  for (id allocation : as_set(self)->committed)
    bytes += send<uint64_t>(allocation, size);
  return bytes;
}

void set_request(id, SEL) {}
void queue_add_set(id, SEL, id) {}
void queue_add_sets(id, SEL, const id*, uint64_t) {}
void descriptor_capacity(id, SEL, uint64_t) {}

Class residency_class() {
  static Class cls = [] {
    Class made =
        define_class("IOGPUMetalResidencySet", labelled_class(),
                     {{"addAllocation:", "v24@0:8@16", imp(&set_add)},
                      {"removeAllocation:", "v24@0:8@16", imp(&set_remove)},
                      {"commit", "v16@0:8", imp(&set_commit)},
                      {"allocationCount", "Q16@0:8", imp(&set_count)},
                      {"allocatedSize", "Q16@0:8", imp(&set_size)},
                      {"requestResidency", "v16@0:8", imp(&set_request)},
                      {"endResidency", "v16@0:8", imp(&set_request)}});
    set_instances<ResidencySet>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

id device_new_set(id, SEL, id, id* error) {
  if (error != nullptr) *error = nullptr;
  return make_object<ResidencySet>(residency_class());
}

[[maybe_unused]] const bool classes_ready = [] {
  Class descriptor = define_class(
      "MTLResidencySetDescriptor", labelled_class(),
      {{"setInitialCapacity:", "v24@0:8Q16", imp(&descriptor_capacity)}});
  register_class(descriptor);
  for (int family = 0; family < kFamilies; ++family) {
    add_methods(device_class(family),
                {{"newResidencySetWithDescriptor:error:", "@32@0:8@16^@24",
                  imp(&device_new_set)}});
    add_methods(
        queue_class(family),
        {{"addResidencySet:", "v24@0:8@16", imp(&queue_add_set)},
         {"addResidencySets:count:", "v32@0:8r^@16Q24", imp(&queue_add_sets)},
         {"removeResidencySet:", "v24@0:8@16", imp(&queue_add_set)}});
  }
  return true;
}();

}  // namespace
}  // namespace metalsim
