// MLX's waiting for itself: signals that are encoded and not committed, and the
// waits that they hold up.
//
// When MLX 0.32 raises in the midst of an evaluation it waits for its streams
// before it has committed what it has encoded. (0.32.1 to 0.32.3 do so in turn,
// the CPU's first.) A thread that waits for one of those signals, or for a
// committed buffer that does, waits for ever: the thread that would commit it
// waits too. Such waits are found here; waiting.cpp ends them.
//
// The rules:
// R14 A thread that waits for a buffer while it has open signals that buffers
//     in flight wait for does them itself.
// R15 A wait is held up when it, or any committed buffer that it depends on,
//     waits for a signal that is encoded and not committed. Two that wait for
//     each other alone are not held up.
// R16 It is ended by the failure when each of the buffers that hold it up was
//     opened longer than `age` ago, and what its thread had committed before
//     failed: at most `recent` before it was opened, and longer than `age` ago.
// R17 Any other is ended when the same signals have held a wait up for the
//     gate's limit, and any later wait that they hold up at once.
//
// As the ledger, it takes no lock, reads no clock and sends no message. Any
// thread, with SharedLedger's lock; not for the crash path. `held_up_by` takes
// the square of what is open and in flight, all else one pass over it.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "metal/ledger.h"

namespace mlx_safe::metal {

class SelfWaits {
 public:
  explicit SelfWaits(const Ledger& ledger) : ledger_(ledger) {}

  // A buffer that this thread had encoded failed.
  void note_failure(std::thread::id encoder, TimePoint now);

  // Whether `thread` has an open signal: encoded, and not committed yet.
  bool is_encoding(std::thread::id thread) const;
  // Of those, the ones that a buffer in flight waits for (R14).
  std::vector<WaitRef> awaited_from(std::thread::id thread) const;

  // What buffers in flight wait for: before `held_up_by` its caller looks how
  // far these events have got, since no message is sent from here.
  std::vector<WaitRef> waits_in_flight() const;
  using Reached = std::unordered_map<Id, std::uint64_t>;

  struct Times {
    TimePoint now;
    std::chrono::milliseconds age, recent;  // R16
  };
  struct HeldUp {
    std::vector<WaitRef> by;  // open signals
    bool by_failure = false;  // each of them (R16)
    bool given_up = false;    // each of them: `give_up_on` was called (R17)
  };
  // What keeps `event` from `value` (R15): nothing when it may come by what is
  // committed, or by a CPU. An event that is not in `reached` has reached 0.
  HeldUp held_up_by(Id event, std::uint64_t value, const Reached& reached,
                    const Times& times) const;
  // A wait for these signals was ended as no thread seems to commit them (R17).
  void give_up_on(const std::vector<WaitRef>& open_signals);

 private:
  bool is_awaited(Id event, std::uint64_t value) const;
  bool has_failed_around(const Buffer& open, const Times& times) const;

  const Ledger& ledger_;
  // When a buffer that a thread had encoded failed last, for some threads.
  std::vector<std::pair<std::thread::id, TimePoint>> failed_for_;
};

}  // namespace mlx_safe::metal
