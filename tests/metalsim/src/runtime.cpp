// Selectors, classes and methods of the simulated runtime.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "../metalsim.h"
#include "metal.h"
#include "objc.h"

namespace metalsim {
namespace {

struct Removed {
  Class cls;
  Method method;
};

// Never destroyed: other threads may still send messages while the process
// exits.
struct Registry {
  std::shared_mutex lock;
  std::unordered_map<std::string, SEL> selectors;
  std::vector<Class> classes;  // with their metaclasses
  std::vector<Removed> removed;
};

Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

[[noreturn]] void unrecognized(id self, SEL sel) {
  std::fprintf(
      stderr, "*** -[%s %s]: unrecognized selector sent to instance %p\n",
      self->isa->name.c_str(), sel->name.c_str(), static_cast<void*>(self));
  std::abort();
}

Method own_method(Class cls, SEL sel) {
  auto found =
      std::find_if(cls->methods.begin(), cls->methods.end(),
                   [sel](Method method) { return method->name == sel; });
  return found == cls->methods.end() ? nullptr : *found;
}

Method find_method_locked(Class cls, SEL sel) {
  for (Class at = cls; at != nullptr; at = at->super) {
    if (Method method = own_method(at, sel)) return method;
  }
  return nullptr;
}

void forget_cached(SEL sel) {
  if (sel->index >= kCacheSize) return;
  for (Class cls : registry().classes) {
    cls->cache[sel->index].store(nullptr, std::memory_order_release);
  }
}

Method find_method(Class cls, SEL sel) {
  bool cacheable = sel->index < kCacheSize;
  if (cacheable) {
    Method method = cls->cache[sel->index].load(std::memory_order_acquire);
    if (method != nullptr) return method;
  }
  std::unique_lock guard(registry().lock);
  Method method = find_method_locked(cls, sel);
  if (method != nullptr && cacheable) {
    cls->cache[sel->index].store(method, std::memory_order_release);
  }
  return method;
}

Method new_method(SEL sel, IMP imp, const char* types, bool original) {
  auto* method = new objc_method;
  method->name = sel;
  method->types = types ? types : "";
  method->imp.store(imp);
  method->original = original ? imp : nullptr;
  return method;
}

Class find_class(const char* name) {
  if (name == nullptr) return nullptr;
  std::shared_lock guard(registry().lock);
  for (Class cls : registry().classes) {
    if (!cls->meta && cls->registered && cls->name == name) return cls;
  }
  return nullptr;
}

void fill_class(Class cls, const char* name, Class super, bool meta) {
  cls->name = name;
  cls->super = super;
  cls->meta = meta;
  if (super != nullptr) {
    cls->destroy = super->destroy;
    cls->create = super->create;
  }
  std::unique_lock guard(registry().lock);
  registry().classes.push_back(cls);
}

}  // namespace

IMP find_implementation(Class cls, SEL sel) {
  Method method = find_method(cls, sel);
  if (method == nullptr) return reinterpret_cast<IMP>(&unrecognized);
  return method->imp.load(std::memory_order_acquire);
}

void add_methods(Class cls, std::initializer_list<MethodSpec> methods) {
  for (const MethodSpec& spec : methods) {
    SEL sel = sel_registerName(spec.name);
    Method method = new_method(sel, spec.imp, spec.types, true);
    std::unique_lock guard(registry().lock);
    cls->methods.push_back(method);
    forget_cached(sel);
  }
}

Class define_class(const char* name, Class super,
                   std::initializer_list<MethodSpec> methods,
                   std::initializer_list<MethodSpec> class_methods) {
  auto* cls = new objc_class;
  auto* meta = new objc_class;
  // The root metaclass inherits from the root class, so that class objects
  // understand what instances of NSObject do.
  fill_class(meta, name, super ? super->isa : cls, true);
  fill_class(cls, name, super, false);
  cls->isa = meta;
  meta->isa = super ? super->isa->isa : meta;
  add_methods(cls, methods);
  add_methods(meta, class_methods);
  return cls;
}

void define_block_class(objc_class& cls, const char* name) {
  Class root = nsobject_class();
  fill_class(&cls, name, root, false);
  cls.isa = root->isa;
  cls.block = true;
  cls.registered = true;
}

void register_class(Class cls) {
  for (Class at = cls; at != nullptr; at = at->super) at->registered = true;
}

bool is_kind_of(id object, Class cls) {
  if (object == nullptr) return false;
  for (Class at = object->isa; at != nullptr; at = at->super) {
    if (at == cls) return true;
  }
  return false;
}

void fail_assertion(id object, SEL sel, const char* what) {
  std::fprintf(stderr, "-[%s %s]: failed assertion `%s'\n",
               object->isa->name.c_str(), sel->name.c_str(), what);
  std::abort();
}

void restore_removed_selectors() {
  std::unique_lock guard(registry().lock);
  for (const Removed& removed : registry().removed) {
    removed.cls->methods.push_back(removed.method);
    forget_cached(removed.method->name);
  }
  registry().removed.clear();
}

}  // namespace metalsim

using namespace metalsim;

METALSIM_EXPORT SEL sel_registerName(const char* name) {
  Registry& all = registry();
  {
    std::shared_lock guard(all.lock);
    auto found = all.selectors.find(name);
    if (found != all.selectors.end()) return found->second;
  }
  std::unique_lock guard(all.lock);
  auto [place, added] = all.selectors.try_emplace(name, nullptr);
  if (added) {
    auto index = static_cast<uint32_t>(all.selectors.size() - 1);
    place->second = new objc_selector{name, index};
  }
  return place->second;
}

METALSIM_EXPORT const char* sel_getName(SEL sel) {
  return sel ? sel->name.c_str() : "<null selector>";
}

METALSIM_EXPORT Class objc_getClass(const char* name) {
  return find_class(name);
}

METALSIM_EXPORT Class objc_lookUpClass(const char* name) {
  return find_class(name);
}

METALSIM_EXPORT Class object_getClass(id object) {
  return object ? object->isa : nullptr;
}

METALSIM_EXPORT const char* class_getName(Class cls) {
  return cls ? cls->name.c_str() : "nil";
}

METALSIM_EXPORT Class class_getSuperclass(Class cls) {
  if (cls == nullptr) return nullptr;
  bool first_of_metal =
      cls->super == nsobject_class() || cls->super == labelled_class();
  return settings().rootless && first_of_metal ? nullptr : cls->super;
}

METALSIM_EXPORT Method class_getInstanceMethod(Class cls, SEL sel) {
  return cls && sel ? find_method(cls, sel) : nullptr;
}

METALSIM_EXPORT Method* class_copyMethodList(Class cls, unsigned* count) {
  if (count != nullptr) *count = 0;
  if (cls == nullptr) return nullptr;
  std::shared_lock guard(registry().lock);
  size_t size = cls->methods.size();
  if (size == 0) return nullptr;
  // Terminated by a null pointer, and free() is the caller's, as documented.
  auto* list = static_cast<Method*>(std::calloc(size + 1, sizeof(Method)));
  std::copy(cls->methods.begin(), cls->methods.end(), list);
  if (count != nullptr) *count = static_cast<unsigned>(size);
  return list;
}

METALSIM_EXPORT IMP class_getMethodImplementation(Class cls, SEL sel) {
  // As on a Mac a missing method gives a forwarding stub, not null.
  return cls && sel ? find_implementation(cls, sel) : nullptr;
}

METALSIM_EXPORT BOOL class_addMethod(Class cls, SEL sel, IMP imp,
                                     const char* types) {
  if (cls == nullptr || sel == nullptr || imp == nullptr) return false;
  std::unique_lock guard(registry().lock);
  if (own_method(cls, sel) != nullptr) return false;
  cls->methods.push_back(new_method(sel, imp, types, false));
  forget_cached(sel);
  return true;
}

METALSIM_EXPORT IMP class_replaceMethod(Class cls, SEL sel, IMP imp,
                                        const char* types) {
  if (cls == nullptr || sel == nullptr || imp == nullptr) return nullptr;
  std::unique_lock guard(registry().lock);
  if (Method method = own_method(cls, sel)) return method->imp.exchange(imp);
  cls->methods.push_back(new_method(sel, imp, types, false));
  forget_cached(sel);
  return nullptr;
}

METALSIM_EXPORT SEL method_getName(Method method) {
  return method ? method->name : nullptr;
}

METALSIM_EXPORT IMP method_getImplementation(Method method) {
  return method ? method->imp.load(std::memory_order_acquire) : nullptr;
}

METALSIM_EXPORT IMP method_setImplementation(Method method, IMP imp) {
  if (method == nullptr || imp == nullptr) return nullptr;
  return method->imp.exchange(imp, std::memory_order_acq_rel);
}

METALSIM_EXPORT const char* method_getTypeEncoding(Method method) {
  return method ? method->types.c_str() : nullptr;
}

int metalsim_remove_selector(const char* name) {
  SEL sel = sel_registerName(name);
  std::unique_lock guard(registry().lock);
  int count = 0;
  for (Class cls : registry().classes) {
    Method method = own_method(cls, sel);
    if (method == nullptr) continue;
    std::erase(cls->methods, method);
    registry().removed.push_back({cls, method});
    ++count;
  }
  forget_cached(sel);
  return count;
}

int64_t metalsim_live_objects(const char* class_name) {
  std::shared_lock guard(registry().lock);
  int64_t count = 0;
  for (Class cls : registry().classes) {
    if (cls->meta) continue;
    for (Class at = cls; at != nullptr; at = at->super) {
      if (at->name != class_name) continue;
      count += cls->live.load();
      break;
    }
  }
  return count;
}

uint32_t metalsim_modified_methods() {
  std::shared_lock guard(registry().lock);
  uint32_t count = 0;
  for (Class cls : registry().classes) {
    for (Method method : cls->methods) {
      if (method->imp.load() != method->original) ++count;
    }
  }
  return count;
}
