// MTLDevice, MTLBuffer, MTLFence and the classes that carry a label.

#include "metal.h"

namespace metalsim {
namespace {

id get_label(id self, SEL) { return static_cast<Labelled*>(self)->label; }

void set_label(id self, SEL, id label) {
  auto* object = static_cast<Labelled*>(self);
  id old = object->label;
  object->label = objc_retain(label);
  objc_release(old);
}

// ---- MTLBuffer -------------------------------------------------------------

uint64_t buffer_length(id self, SEL) {
  return static_cast<Buffer*>(self)->length;
}

void* buffer_contents(id self, SEL) {
  auto* buffer = static_cast<Buffer*>(self);
  // Made on demand: tests of the working set allocate far more than exists. Any
  // number of threads may be the first to ask.
  std::call_once(buffer->contents_made, [buffer] {
    buffer->contents = std::make_unique<unsigned char[]>(buffer->length);
  });
  return buffer->contents.get();
}

Class metal_buffer_class() {
  static Class cls = [] {
    Class resource = define_class("_MTLResource", labelled_class(), {});
    Class iogpu = define_class("IOGPUMetalResource", resource, {});
    Class made =
        define_class("IOGPUMetalBuffer", iogpu,
                     {{"length", "Q16@0:8", imp(&buffer_length)},
                      {"allocatedSize", "Q16@0:8", imp(&buffer_length)},
                      {"contents", "^v16@0:8", imp(&buffer_contents)}});
    set_instances<Buffer>(made);
    return made;
  }();
  return cls;
}

// ---- MTLDevice -------------------------------------------------------------

id device_new_queue(id self, SEL) {
  int family = settings().family.load();
  register_family(family);
  auto* queue = make_object<CommandQueue>(queue_class(family));
  queue->family = family;
  queue->device = static_cast<Device*>(objc_retain(self));
  return queue;
}

id device_new_queue_bounded(id self, SEL, uint64_t) {
  static SEL plain = sel_registerName("newCommandQueue");
  return send<id>(self, plain);
}

id device_new_event(id, SEL) {
  int family = settings().family.load();
  register_family(family);
  id event = make_event(family);
  if (!(settings().debug_layers & METALSIM_DEBUG_EVENTS)) return event;
  id wrapper = wrap_event(event);
  objc_release(event);
  return wrapper;
}

id device_new_buffer(id self, SEL, uint64_t length, uint64_t) {
  if (length == 0) return nullptr;
  int family = static_cast<Device*>(self)->family;
  auto* buffer = make_object<Buffer>(buffer_class(family));
  buffer->length = length;
  resident_bytes().fetch_add(length);
  return buffer;
}

id device_new_fence(id, SEL) { return make_object<Labelled>(fence_class()); }

uint64_t device_working_set(id, SEL) {
  uint64_t chosen = settings().working_set.load();
  return chosen ? chosen : kDefaultWorkingSet;
}

uint64_t device_allocated(id, SEL) { return resident_bytes().load(); }

id device_name(id, SEL) { return autorelease(make_string("Apple Sim")); }

Class metal_device_class() {
  static Class cls = [] {
    Class base = define_class("_MTLDevice", nsobject_class(),
                              {{"name", "@16@0:8", imp(&device_name)},
                               {"recommendedMaxWorkingSetSize", "Q16@0:8",
                                imp(&device_working_set)}});
    Class made = define_class(
        "IOGPUMetalDevice", base,
        {{"newCommandQueue", "@16@0:8", imp(&device_new_queue)},
         {"newCommandQueueWithMaxCommandBufferCount:", "@24@0:8Q16",
          imp(&device_new_queue_bounded)},
         {"newSharedEvent", "@16@0:8", imp(&device_new_event)},
         {"newBufferWithLength:options:", "@32@0:8Q16Q24",
          imp(&device_new_buffer)},
         {"newFence", "@16@0:8", imp(&device_new_fence)},
         {"currentAllocatedSize", "Q16@0:8", imp(&device_allocated)}});
    set_instances<Device>(made);
    return made;
  }();
  return cls;
}

}  // namespace

Buffer::~Buffer() { resident_bytes().fetch_sub(length); }

std::atomic<uint64_t>& resident_bytes() {
  static std::atomic<uint64_t> bytes{0};
  return bytes;
}

Class labelled_class() {
  static Class cls = [] {
    Class made = define_class("_MTLObjectWithLabel", nsobject_class(),
                              {{"label", "@16@0:8", imp(&get_label)},
                               {"setLabel:", "v24@0:8@16", imp(&set_label)}});
    set_instances<Labelled>(made);
    return made;
  }();
  return cls;
}

Class fence_class() {
  static Class cls = [] {
    Class base = define_class("_MTLFence", labelled_class(), {});
    return define_class("IOGPUMetalFence", base, {});
  }();
  return cls;
}

Class device_class(int family) {
  static Class classes[kFamilies] = {
      define_class(
          "AGXG16XDevice",
          define_class("AGXG16XFamilyDevice", metal_device_class(), {}), {}),
      define_class(
          "AGXG17XDevice",
          define_class("AGXG17XFamilyDevice", metal_device_class(), {}), {})};
  return classes[family];
}

Class buffer_class(int family) {
  static Class classes[kFamilies] = {
      define_class("AGXG16XFamilyBuffer", metal_buffer_class(), {}),
      define_class("AGXG17XFamilyBuffer", metal_buffer_class(), {})};
  return classes[family];
}

// Like a driver's bundle, all of a family's classes appear together.
void register_family(int family) {
  static std::atomic<bool> done[kFamilies];
  if (done[family].load(std::memory_order_acquire)) return;
  for (Class cls :
       {device_class(family), queue_class(family), command_buffer_class(family),
        event_class(family), buffer_class(family), encoder_class(family),
        fence_class()}) {
    register_class(cls);
  }
  done[family].store(true, std::memory_order_release);
}

}  // namespace metalsim

using namespace metalsim;

METALSIM_EXPORT id MTLCreateSystemDefaultDevice() {
  if (settings().no_device) return nullptr;
  // One device per process and family; every caller gets a reference.
  static Device* devices[kFamilies];
  static std::mutex lock;
  int family = settings().family.load();
  std::lock_guard guard(lock);
  if (devices[family] == nullptr) {
    register_family(family);
    devices[family] = make_object<Device>(device_class(family));
    devices[family]->family = family;
  }
  return objc_retain(devices[family]);
}
