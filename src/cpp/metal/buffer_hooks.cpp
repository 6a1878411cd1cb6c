// Hooks of command buffers.
//
// On whatever thread sends the message; for MLX one that encodes, and for
// `dealloc`, which always forgets, Metal's completion thread too. Nested in
// another hook they only pass on, and in a completion handler those that could
// wait or raise. Only `waitUntilCompleted` waits. None is for the crash path.
#include <utility>

#include "metal/completion.h"
#include "metal/hook_functions.h"
#include "metal/hook_state.h"
#include "metal/hook_table.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"
#include "metal/waiting.h"

namespace mlx_safe::metal {

using objc::send;

void hook_addCompletedHandler(Original<void, const void*> original, Id self,
                              Selector selector, const void* block) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || block == nullptr)
    return original(self, selector, block);
  add_wrapped(original, self, selector, block);
}

void hook_commit(Original<void> original, Id self, Selector selector) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active()) return original(self, selector);
  see_class(Kind::kBuffer, self);
  std::uint64_t number =
      g_counters.buffers.fetch_add(1, std::memory_order_relaxed) + 1;
  ledger().committed(self, send<Id>(self, selectors().commandQueue));
  // Last of all: when it runs, every handler of MLX's has run.
  add_last_handler(self, number);
  original(self, selector);
}

void hook_encodeSignal(Original<void, Id, std::uint64_t> original, Id self,
                       Selector selector, Id event, std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && event != nullptr)
    ledger().signal_encoded(self, event, value);
  original(self, selector, event, value);
}

void hook_encodeWait(Original<void, Id, std::uint64_t> original, Id self,
                     Selector selector, Id event, std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && event != nullptr)
    ledger().wait_encoded(self, event, value);
  original(self, selector, event, value);
}

void hook_waitUntilCompleted(Original<void> original, Id self,
                             Selector selector) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return original(self, selector);
  BufferRef record = ledger().find(self);
  if (record && ledger().is_encoding_here()) let_go_of_own_signals(record);
  original(self, selector);
  if (record && !ledger().settle_buffer(record, gate_limit()))
    give_up_waiting();
  await_skipped(gate_limit());
}

// MLX 0.31.2's synchronize looks at the status of its own, empty buffer; a
// failure of an earlier one on the queue must show there (R5).
std::uint64_t hook_status(Original<std::uint64_t> original, Id self,
                          Selector selector) {
  PassThrough pass;
  std::uint64_t status = original(self, selector);
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return status;
  if (status != kStatusCompleted && status != kStatusError) return status;
  if (t_state.shown != nullptr) t_state.shown->reset();
  if (!may_throw()) return status;
  FailureRef failure =
      ledger().unraised_on(send<Id>(self, selectors().commandQueue));
  if (!failure) return status;
  // MLX asks for the error's text, and crashes where there is none.
  if (!failure->error) raise(failure);
  ledger().raised(failure);
  remember(&t_state.shown, std::move(failure));
  return kStatusError;
}

Id hook_error(Original<Id> original, Id self, Selector selector) {
  PassThrough pass;
  Id error = original(self, selector);
  if (error != nullptr || pass.was_inside() || t_state.shown == nullptr ||
      !*t_state.shown)
    return error;
  return (*t_state.shown)->error.get();
}

void hook_buffer_dealloc(Original<void> original, Id self, Selector selector) {
  ledger().forget_buffer(self);
  original(self, selector);
}

}  // namespace mlx_safe::metal
