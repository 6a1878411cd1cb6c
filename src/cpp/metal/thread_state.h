// What the hooks remember about the calling thread. Any thread, Metal's
// included; not for the crash path: it allocates.
//
// Plain values only, never destroyed: MLX's own thread-local encoders outlive
// other thread-locals at thread exit and still call hooked methods then.
#pragma once

#include <cstdint>

#include "metal/ledger.h"

namespace mlx_safe::metal {

struct ThreadState {
  int nested = 0;      // inside a hooked method: calls from there pass through
  int in_handler = 0;  // inside a completion handler
  bool may_throw = false;
  // Failure that a wait of this thread, which must not throw, ran into; what
  // the thread signals next depends on it. Owned, leaked at thread exit.
  FailureRef* consumed = nullptr;
  bool consumed_passed_on = false;
  // Failure that the last `status` showed, for the `error` that is read next.
  FailureRef* shown = nullptr;
};

inline constinit thread_local ThreadState t_state{};

inline void remember(FailureRef** slot, FailureRef failure) {
  if (*slot == nullptr) *slot = new FailureRef;
  **slot = std::move(failure);
}

// The failure that this thread's next signal depends on (R18); null: none. It
// ends when the thread has passed it on and a thread has raised it: rather one
// signal too many is marked failed than one too few.
inline FailureRef consumed_failure() {
  if (t_state.consumed == nullptr || !*t_state.consumed) return nullptr;
  if (t_state.consumed_passed_on && (*t_state.consumed)->raised.load())
    t_state.consumed->reset();
  return *t_state.consumed;
}

inline void consume(FailureRef failure) {
  remember(&t_state.consumed, std::move(failure));
  t_state.consumed_passed_on = false;
}

// Hooked methods called inside this scope do only what the original does.
class PassThrough {
 public:
  PassThrough() noexcept : was_inside_(t_state.nested > 0) { ++t_state.nested; }
  ~PassThrough() { --t_state.nested; }
  PassThrough(const PassThrough&) = delete;
  PassThrough& operator=(const PassThrough&) = delete;
  // True when a hooked method called this one: the outermost does the work.
  bool was_inside() const noexcept { return was_inside_; }

 private:
  bool was_inside_;
};

// While a completion handler runs. It may run inside a hooked `commit` (a
// device that completes at once), so the nesting is set aside.
class HandlerScope {
 public:
  HandlerScope() noexcept : nested_(t_state.nested) {
    t_state.nested = 0;
    ++t_state.in_handler;
  }
  ~HandlerScope() {
    --t_state.in_handler;
    t_state.nested = nested_;
  }
  HandlerScope(const HandlerScope&) = delete;
  HandlerScope& operator=(const HandlerScope&) = delete;

 private:
  int nested_;
};

}  // namespace mlx_safe::metal
