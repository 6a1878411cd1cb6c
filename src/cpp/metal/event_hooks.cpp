// Hooks of shared events.
//
// On whatever thread sends the message, in MLX Python's and its CPU streams'.
// In a completion handler all but `dealloc` and `setSignaledValue:`, which may
// take a millisecond, only pass on. Only `waitUntilSignaledValue:` waits, and
// only it raises, where `may_throw()`. None is for the crash path.
#include <chrono>
#include <utility>

#include "metal/completion.h"
#include "metal/hook_functions.h"
#include "metal/hook_state.h"
#include "metal/hook_table.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"
#include "metal/waiting.h"

namespace mlx_safe::metal {
namespace {

constexpr std::uint64_t kForever_ms = 1'000'000'000;  // MLX: 2^64 - 1

// How long a wait may be held back, of the time that its caller gave it.
std::chrono::milliseconds rest_of(std::uint64_t timeout_ms,
                                  std::chrono::steady_clock::time_point begin) {
  using std::chrono::milliseconds;
  auto spent = std::chrono::duration_cast<milliseconds>(
      std::chrono::steady_clock::now() - begin);
  auto limit = gate_limit();
  if (timeout_ms > kForever_ms) return limit;
  milliseconds given(static_cast<std::int64_t>(timeout_ms));
  return std::min(limit, std::max(given - spent, milliseconds(0)));
}

}  // namespace

bool hook_waitUntilSignaledValue(
    Original<bool, std::uint64_t, std::uint64_t> original, Id self,
    Selector selector, std::uint64_t value, std::uint64_t timeout_ms) {
  PassThrough pass;
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return original(self, selector, value, timeout_ms);
  auto begin = std::chrono::steady_clock::now();
  bool reached;
  try {
    reached = timeout_ms > kForever_ms && !may_throw()
                  ? wait_on_cpu_stream(original, self, selector, value)
                  : original(self, selector, value, timeout_ms);
  } catch (...) {
    // A second copy of this library, below this one, has raised the failure.
    if (FailureRef failure = ledger().failure_of(self, value))
      ledger().raised(failure);
    throw;
  }
  if (!reached) return reached;
  auto limit = rest_of(timeout_ms, begin);
  if (!ledger().settle_event(self, value, value_of(self), limit)) {
    // The caller's own time is up.
    if (limit < gate_limit()) return false;
    give_up_waiting();
  }
  await_skipped(rest_of(timeout_ms, begin));
  if (hook_mode() != Mode::kIntercept) return reached;  // MLX raises by itself
  FailureRef failure = ledger().failure_of(self, value);
  if (!failure) return reached;
  if (may_throw()) raise(failure);
  consume(std::move(failure));
  return reached;
}

std::uint64_t hook_signaledValue(Original<std::uint64_t> original, Id self,
                                 Selector selector) {
  PassThrough pass;
  std::uint64_t real = original(self, selector);
  if (pass.was_inside() || !hooks_active() || t_state.in_handler > 0)
    return real;
  if (may_throw()) return ledger().visible(self, real);
  // A thread that may not raise would poll for ever: it is let go, and what it
  // signals next is marked failed (R18).
  if (FailureRef failure = ledger().failure_of(self, real))
    consume(std::move(failure));
  return ledger().settled_value(self, real);
}

void hook_setSignaledValue(Original<void, std::uint64_t> original, Id self,
                           Selector selector, std::uint64_t value) {
  PassThrough pass;
  if (!pass.was_inside() && hooks_active() && t_state.in_handler == 0) {
    FailureRef failure = consumed_failure();
    ledger().signalled_by_cpu(self, value, failure);
    if (failure) t_state.consumed_passed_on = true;
  }
  if (!pass.was_inside() && hooks_active() && would_lower(self, value)) return;
  original(self, selector, value);
}

void hook_event_dealloc(Original<void> original, Id self, Selector selector) {
  ledger().forget_event(self);
  original(self, selector);
}

}  // namespace mlx_safe::metal
