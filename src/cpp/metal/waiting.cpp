#include "metal/waiting.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "metal/hook_state.h"
#include "metal/hook_table.h"
#include "metal/selectors.h"
#include "metal/thread_state.h"

// waiting.h says which threads this is for: no function of this file may run on
// Metal's threads or in the crash path.

namespace mlx_safe::metal {

using namespace std::chrono_literals;

// The thread waits before it goes on, but not while it has open signals: the
// work that it would wait for may be waiting for them.
void await_skipped(std::chrono::milliseconds limit) {
  using Clock = std::chrono::steady_clock;
  std::vector<WaitRef> waits = skipped_waits().all();
  if (waits.empty() || !may_throw() || ledger().is_encoding_here()) return;
  bool whole = limit >= gate_limit();
  Clock::duration left = limit;
  Clock::time_point last = Clock::now();
  for (const WaitRef& wait : waits) {
    Id event = wait->event.get();
    while (value_of(event) < wait->value && left > 0s) {
      std::this_thread::sleep_for(100us);
      Clock::time_point now = Clock::now();
      // While the process is stopped that work does not go on either.
      left -= std::min<Clock::duration>(now - last, 100ms);
      last = now;
    }
    if (value_of(event) < wait->value) {
      if (!whole) return;
      g_counters.gate_limit.fetch_add(1);
    }
    skipped_waits().forget(wait);
  }
}

namespace {

// Does signals that no thread can commit.
void signal_instead(const std::vector<WaitRef>& held) {
  for (const WaitRef& wait : held)
    if (value_of(wait->event.get()) < wait->value)
      objc::send<void>(wait->event.get(), selectors().setSignaledValue,
                       wait->value);
}

SelfWaits::HeldUp held_up_by(Id event, std::uint64_t value) {
  SelfWaits::Reached reached;
  for (const WaitRef& wait : ledger().waits_in_flight())
    reached.emplace(wait->event.get(), value_of(wait->event.get()));
  return ledger().held_up_by(event, value, reached, 1s, 100ms);
}

bool is_same(const std::vector<WaitRef>& one,
             const std::vector<WaitRef>& other) {
  return std::is_permutation(one.begin(), one.end(), other.begin(), other.end(),
                             [](const auto& a, const auto& b) {
                               return a->event.get() == b->event.get() &&
                                      a->value == b->value;
                             });
}

// R17: no thread seems to commit these. A fault is counted, and what depends on
// the signals is marked failed.
void give_up_on(const std::vector<WaitRef>& open_signals) {
  ledger().give_up_on(open_signals);
  give_up_waiting();
  if (FailureRef failure = consumed_failure())
    for (const WaitRef& wait : open_signals)
      ledger().signalled_by_cpu(wait->event.get(), wait->value, failure);
}

}  // namespace

// When MLX 0.32 raises a stored failure in the midst of an evaluation, it waits
// for each stream in turn. The first may wait for what this very thread has
// encoded for the next and not committed. No other thread can commit it: the
// signals are done, as that evaluation has failed.
void let_go_of_own_signals(const BufferRef& waited_for) {
  while (!ledger().settle_buffer(waited_for, 50ms)) {
    if (!any_failed()) continue;  // MLX knows before our handler has run
    signal_instead(ledger().awaited_from_here());
    if (!ledger().is_encoding_here()) return;
  }
}

// This thread is one of MLX's CPU streams. Python's thread may be waiting for
// it, and may hold open signals that it waits for in turn. When MLX 0.32 raises
// in the midst of an evaluation it waits for the CPU's streams first.
//
// Where the failure ends the wait (R16), MLX is raising already. A buffer that
// was opened more than 100 ms after the failure may belong to a new evaluation,
// in which no thread raises. Then R17 ends the wait and a fault is counted, as
// it is not known which thread reads the data. In both cases the open signals
// are done. The buffers that wait for them run, in their order, and are through
// before the memory is let go of that they use.
bool wait_on_cpu_stream(Original<bool, std::uint64_t, std::uint64_t> original,
                        Id event, Selector selector, std::uint64_t value) {
  // An evaluation that has failed may leave many waits behind: soon, at first.
  std::uint64_t look_after_ms = any_failed() ? 50 : 500;
  std::chrono::milliseconds unchanged = 0ms;
  std::vector<WaitRef> before;
  for (; !original(event, selector, value, look_after_ms);
       look_after_ms = 500) {
    if (!any_failed()) continue;
    SelfWaits::HeldUp held = held_up_by(event, value);
    // Counted by looks: while the process is stopped nothing is committed.
    unchanged = !held.by.empty() && is_same(held.by, before)
                    ? unchanged + std::chrono::milliseconds(look_after_ms)
                    : 0ms;
    before = std::move(held.by);
    bool by_failure = held.by_failure && hook_mode() == Mode::kObserve;
    bool gives_up =
        held.given_up || (!before.empty() && unchanged >= gate_limit());
    if (!by_failure && !gives_up) continue;
    if (!by_failure) give_up_on(before);
    signal_instead(before);
  }
  return true;
}

}  // namespace mlx_safe::metal
