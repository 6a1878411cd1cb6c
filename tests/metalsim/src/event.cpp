// MTLSharedEvent.

#include <chrono>

#include "metal.h"

namespace metalsim {
namespace {

uint64_t event_value(id self, SEL) {
  return static_cast<SharedEvent*>(self)->value.load(std::memory_order_acquire);
}

void event_set_value(id self, SEL, uint64_t value) {
  auto* event = static_cast<SharedEvent*>(self);
  {
    std::lock_guard guard(event->lock);
    event->value.store(value, std::memory_order_release);
  }
  event->changed.notify_all();
}

// The longest wait that needs no care for overflow; longer ones are for ever.
constexpr uint64_t kLongestMs = uint64_t{1000} * 3600 * 24 * 365;

BOOL event_wait(id self, SEL, uint64_t value, uint64_t timeout_ms) {
  auto* event = static_cast<SharedEvent*>(self);
  auto reached = [event, value] { return event->value.load() >= value; };
  std::unique_lock guard(event->lock);
  if (timeout_ms > kLongestMs) {
    event->changed.wait(guard, reached);
    return true;
  }
  return event->changed.wait_for(guard, std::chrono::milliseconds(timeout_ms),
                                 reached);
}

Class metal_event_class();

// The real classes have one too, for what they hold.
void event_dealloc(id self, SEL cmd) {
  send_super(metal_event_class(), self, cmd);
}

Class metal_event_class() {
  static Class cls = [] {
    Class made = define_class(
        "_MTLSharedEvent", labelled_class(),
        {{"signaledValue", "Q16@0:8", imp(&event_value)},
         {"setSignaledValue:", "v24@0:8Q16", imp(&event_set_value)},
         {"dealloc", "v16@0:8", imp(&event_dealloc)}});
    set_instances<SharedEvent>(made);
    return made;
  }();
  return cls;
}

Class iogpu_event_class() {
  static Class cls =
      define_class("IOGPUMetalSharedEvent", metal_event_class(),
                   {{"waitUntilSignaledValue:timeoutMS:", "B32@0:8Q16Q24",
                     imp(&event_wait)}});
  return cls;
}

}  // namespace

Class event_class(int family) {
  static Class classes[kFamilies] = {
      define_class("AGXG16XFamilySharedEvent", iogpu_event_class(), {}),
      define_class("AGXG17XFamilySharedEvent", iogpu_event_class(), {})};
  return classes[family];
}

SharedEvent* make_event(int family) {
  return make_object<SharedEvent>(event_class(family));
}

// A GPU's signal never lowers the value.
void signal_event(SharedEvent* event, uint64_t value) {
  {
    std::lock_guard guard(event->lock);
    if (event->value.load(std::memory_order_relaxed) >= value) return;
    event->value.store(value, std::memory_order_release);
  }
  event->changed.notify_all();
}

}  // namespace metalsim
