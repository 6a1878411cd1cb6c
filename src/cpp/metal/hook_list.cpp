// The list of hooks: every method of Metal that is replaced, and by what.
//
// kIntercept: with MLX up to 0.31.2 only. kRequired: without the method nothing
// is hooked. tests/contract reads this list and holds it against what each
// libmlx.dylib sends.
#include "metal/hook_functions.h"
#include "metal/hook_table.h"

namespace mlx_safe::metal {

// Any thread: made once, by the first install. Not for the crash path.
const std::vector<HookSpec>& hook_list() {
  static const auto* list = new std::vector<HookSpec>{
#define MLX_SAFE_HOOK(kind, selector, function, when, need)         \
  {Kind::kind, selector, Trampolines<__LINE__, &function>::slots(), \
   When::when, Need::need}
      // clang-format off
      // buffer_hooks.cpp
      MLX_SAFE_HOOK(kBuffer, "addCompletedHandler:", hook_addCompletedHandler, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "commit", hook_commit, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "encodeSignalEvent:value:", hook_encodeSignal, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "encodeWaitForEvent:value:", hook_encodeWait, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "waitUntilCompleted", hook_waitUntilCompleted, kAlways, kRequired),
      MLX_SAFE_HOOK(kBuffer, "status", hook_status, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "error", hook_error, kIntercept, kRequired),
      MLX_SAFE_HOOK(kBuffer, "dealloc", hook_buffer_dealloc, kAlways, kOptional),
      // event_hooks.cpp
      MLX_SAFE_HOOK(kEvent, "waitUntilSignaledValue:timeoutMS:", hook_waitUntilSignaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "signaledValue", hook_signaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "setSignaledValue:", hook_setSignaledValue, kAlways, kRequired),
      MLX_SAFE_HOOK(kEvent, "dealloc", hook_event_dealloc, kAlways, kOptional),
      // object_hooks.cpp
      MLX_SAFE_HOOK(kQueue, "commandBuffer", hook_commandBuffer, kAlways, kOptional),
      MLX_SAFE_HOOK(kQueue, "commandBufferWithUnretainedReferences", hook_commandBuffer, kAlways, kRequired),
      MLX_SAFE_HOOK(kQueue, "commandBufferWithDescriptor:", hook_commandBufferWithDescriptor, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newCommandQueue", hook_newCommandQueue, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newCommandQueueWithMaxCommandBufferCount:", hook_newCommandQueueWithCount, kAlways, kOptional),
      MLX_SAFE_HOOK(kDevice, "newSharedEvent", hook_newSharedEvent, kAlways, kOptional),
  // clang-format on
#undef MLX_SAFE_HOOK
  };
  return *list;
}

}  // namespace mlx_safe::metal
