// Hooks of what makes queues, command buffers and events: an address may be
// used again (R12), a class be seen for the first time.
//
// On whatever thread makes the object. They take the ledger's lock, and
// install.cpp's for a class that was not seen before. Only `newSharedEvent` may
// wait, after a failure, where `may_throw()`. None is for the crash path.
#include "metal/hook_functions.h"
#include "metal/hook_state.h"
#include "metal/hook_table.h"
#include "metal/thread_state.h"
#include "metal/waiting.h"

namespace mlx_safe::metal {
namespace {

Id new_buffer(Id buffer, const PassThrough& pass) {
  if (buffer != nullptr && !pass.was_inside()) {
    ledger().forget_buffer(buffer);
    if (hooks_active()) see_class(Kind::kBuffer, buffer);
  }
  return buffer;
}

Id new_queue(Id queue, const PassThrough& pass) {
  if (queue != nullptr && !pass.was_inside()) {
    ledger().forget_queue(queue);
    if (hooks_active()) see_class(Kind::kQueue, queue);
  }
  return queue;
}

}  // namespace

Id hook_commandBuffer(Original<Id> original, Id self, Selector selector) {
  PassThrough pass;
  return new_buffer(original(self, selector), pass);
}

Id hook_commandBufferWithDescriptor(Original<Id, Id> original, Id self,
                                    Selector selector, Id descriptor) {
  PassThrough pass;
  return new_buffer(original(self, selector, descriptor), pass);
}

Id hook_newCommandQueue(Original<Id> original, Id self, Selector selector) {
  PassThrough pass;
  return new_queue(original(self, selector), pass);
}

Id hook_newCommandQueueWithCount(Original<Id, std::uint64_t> original, Id self,
                                 Selector selector, std::uint64_t count) {
  PassThrough pass;
  return new_queue(original(self, selector, count), pass);
}

Id hook_newSharedEvent(Original<Id> original, Id self, Selector selector) {
  PassThrough pass;
  Id event = original(self, selector);
  if (event != nullptr && !pass.was_inside()) {
    ledger().forget_event(event);
    if (hooks_active()) {
      see_class(Kind::kEvent, event);
      // MLX makes one at the start of every evaluation. An evaluation that
      // found its error stored already has waited for nothing: the next one
      // waits here (R13).
      await_skipped(gate_limit());
    }
  }
  return event;
}

}  // namespace mlx_safe::metal
