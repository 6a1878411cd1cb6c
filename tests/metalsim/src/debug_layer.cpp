// Metal's validation layer: objects around objects. Every call goes on to
// the wrapped object as a message, so that hooks on both layers fire.

#include "metal.h"

namespace metalsim {
namespace {

id base_of(id self) { return static_cast<Wrapper*>(self)->base; }

template <class R, class... A>
R forward(id self, SEL sel, A... args) {
  return send<R>(base_of(self), sel, args...);
}

id wrapper_base(id self, SEL) { return base_of(self); }

Class tools_object_class() {
  static Class cls = [] {
    Class made =
        define_class("MTLToolsObject", nsobject_class(),
                     {{"baseObject", "@16@0:8", imp(&wrapper_base)},
                      {"label", "@16@0:8", imp(&forward<id>)},
                      {"setLabel:", "v24@0:8@16", imp(&forward<void, id>)}});
    set_instances<Wrapper>(made);
    return made;
  }();
  return cls;
}

// ---- command buffers -------------------------------------------------------

// A handler is given the object that it was added to, not the one below.
void tools_add_handler(id self, SEL sel, const void* block) {
  void* substituted = make_substituting_block(block, self);
  send<void, const void*>(base_of(self), sel, substituted);
  _Block_release(substituted);
}

void tools_encode_event(id self, SEL sel, id event, uint64_t value) {
  id bare = bare_event(event);
  send<void, id, uint64_t>(base_of(self), sel, bare, value);
}

Class tools_command_buffer_class() {
  static Class cls = define_class(
      "MTLToolsCommandBuffer", tools_object_class(),
      {{"addCompletedHandler:", "v24@0:8@?16", imp(&tools_add_handler)},
       {"addScheduledHandler:", "v24@0:8@?16", imp(&tools_add_handler)},
       {"commit", "v16@0:8", imp(&forward<void>)},
       {"enqueue", "v16@0:8", imp(&forward<void>)},
       {"waitUntilCompleted", "v16@0:8", imp(&forward<void>)},
       {"waitUntilScheduled", "v16@0:8", imp(&forward<void>)},
       {"status", "Q16@0:8", imp(&forward<uint64_t>)},
       {"error", "@16@0:8", imp(&forward<id>)},
       {"commandQueue", "@16@0:8", imp(&forward<id>)},
       {"device", "@16@0:8", imp(&forward<id>)},
       {"GPUStartTime", "d16@0:8", imp(&forward<double>)},
       {"GPUEndTime", "d16@0:8", imp(&forward<double>)},
       {"retainedReferences", "B16@0:8", imp(&forward<BOOL>)},
       {"errorOptions", "Q16@0:8", imp(&forward<uint64_t>)},
       {"encodeSignalEvent:value:", "v32@0:8@16Q24", imp(&tools_encode_event)},
       {"encodeWaitForEvent:value:", "v32@0:8@16Q24", imp(&tools_encode_event)},
       {"computeCommandEncoder", "@16@0:8", imp(&forward<id>)},
       {"computeCommandEncoderWithDispatchType:", "@24@0:8Q16",
        imp(&forward<id, uint64_t>)}});
  return cls;
}

Class debug_command_buffer_class();

void debug_commit(id self, SEL sel) {
  send_super(debug_command_buffer_class(), self, sel);
}

void debug_add_completed(id self, SEL sel, const void* block) {
  send_super(debug_command_buffer_class(), self, sel, block);
}

Class debug_command_buffer_class() {
  static Class cls = define_class(
      "MTLDebugCommandBuffer", tools_command_buffer_class(),
      {{"commit", "v16@0:8", imp(&debug_commit)},
       {"addCompletedHandler:", "v24@0:8@?16", imp(&debug_add_completed)}});
  return cls;
}

// ---- shared events ---------------------------------------------------------

Class debug_event_class() {
  static Class cls = [] {
    Class tools = define_class(
        "MTLToolsSharedEvent", tools_object_class(),
        {{"signaledValue", "Q16@0:8", imp(&forward<uint64_t>)},
         {"setSignaledValue:", "v24@0:8Q16", imp(&forward<void, uint64_t>)},
         {"waitUntilSignaledValue:timeoutMS:", "B32@0:8Q16Q24",
          imp(&forward<BOOL, uint64_t, uint64_t>)}});
    return define_class("MTLDebugSharedEvent", tools, {});
  }();
  return cls;
}

id wrap(id object, Class cls) {
  register_class(cls);
  auto* wrapper = make_object<Wrapper>(cls);
  wrapper->base = objc_retain(object);
  return wrapper;
}

}  // namespace

id wrap_command_buffer(id buffer) {
  return wrap(buffer, debug_command_buffer_class());
}

id wrap_event(id event) { return wrap(event, debug_event_class()); }

SharedEvent* bare_event(id event) {
  static Class wrapped = debug_event_class();
  if (is_kind_of(event, wrapped)) event = base_of(event);
  return static_cast<SharedEvent*>(event);
}

}  // namespace metalsim
