// NSArray, NSURL, NSAutoreleasePool and the class methods of NSString that only
// MLX itself uses.

#include "foundation.h"
#include "metal.h"

namespace metalsim {
namespace {

// ---- NSArray ---------------------------------------------------------------

struct Array : Object {
  std::vector<id> items;
  ~Array() {
    for (id item : items) objc_release(item);
  }
};

uint64_t array_count(id self, SEL) {
  return static_cast<Array*>(self)->items.size();
}

id array_item(id self, SEL sel, uint64_t index) {
  auto& items = static_cast<Array*>(self)->items;
  if (index >= items.size()) fail_assertion(self, sel, "index beyond bounds");
  return items[index];
}

Class array_class() {
  static Class cls = [] {
    Class made =
        define_class("NSArray", nsobject_class(),
                     {{"count", "Q16@0:8", imp(&array_count)},
                      {"objectAtIndex:", "@24@0:8Q16", imp(&array_item)}});
    set_instances<Array>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

// ---- NSURL -----------------------------------------------------------------

struct Url : Object {
  std::string path;
};

id url_init(id self, SEL, id path) {
  static_cast<Url*>(self)->path = text_of(path);
  return self;
}

id url_path(id self, SEL) {
  return autorelease(make_string(static_cast<Url*>(self)->path));
}

Class url_class();

id url_of_file(id, SEL, id path) {
  auto* url = make_object<Url>(url_class());
  url->path = text_of(path);
  return autorelease(url);
}

Class url_class() {
  static Class cls = [] {
    Class made =
        define_class("NSURL", nsobject_class(),
                     {{"initFileURLWithPath:", "@24@0:8@16", imp(&url_init)},
                      {"path", "@16@0:8", imp(&url_path)}},
                     {{"fileURLWithPath:", "@24@0:8@16", imp(&url_of_file)}});
    set_instances<Url>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

// ---- NSAutoreleasePool -----------------------------------------------------

// It is not counted: `release` ends it as `drain` does.
struct Pool : Object {
  void* token = objc_autoreleasePoolPush();
};

void pool_drain(id self, SEL) {
  objc_autoreleasePoolPop(static_cast<Pool*>(self)->token);
  dispose_object(static_cast<Object*>(self));
}

// ---- NSString --------------------------------------------------------------

id string_with_bytes(id, SEL, const char* text, uint64_t) {
  return text ? autorelease(make_string(text)) : nullptr;
}

id string_empty(id, SEL) { return autorelease(make_string("")); }

[[maybe_unused]] const bool classes_ready = [] {
  array_class();
  url_class();
  Class pool = define_class("NSAutoreleasePool", nsobject_class(),
                            {{"drain", "v16@0:8", imp(&pool_drain)},
                             {"release", "Vv16@0:8", imp(&pool_drain)}});
  set_instances<Pool>(pool);
  register_class(pool);
  add_methods(string_class()->isa, {{"stringWithCString:encoding:",
                                     "@32@0:8r*16Q24", imp(&string_with_bytes)},
                                    {"string", "@16@0:8", imp(&string_empty)}});
  return true;
}();

}  // namespace

id make_array(std::vector<id> items) {
  auto* array = make_object<Array>(array_class());
  array->items = std::move(items);
  return array;
}

}  // namespace metalsim

using namespace metalsim;

METALSIM_EXPORT id MTLCreateSystemDefaultDevice();

METALSIM_EXPORT id MTLCopyAllDevices() {
  id device = MTLCreateSystemDefaultDevice();
  return make_array(device ? std::vector<id>{device} : std::vector<id>{});
}

// Observers are never told: no device comes or goes.
METALSIM_EXPORT id MTLCopyAllDevicesWithObserver(id* observer, const void*) {
  if (observer != nullptr) *observer = nullptr;
  return MTLCopyAllDevices();
}
METALSIM_EXPORT void MTLRemoveDeviceObserver(id) {}
METALSIM_EXPORT void* objc_getProtocol(const char*) { return nullptr; }
