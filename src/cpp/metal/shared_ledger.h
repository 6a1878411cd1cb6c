// The ledger, shared by threads: its lock, and the waiting for what settles.
//
// Any thread, Metal's included, unless it is said below; none of it in the
// crash path: it locks and allocates. The lock is held for one call of the
// ledger (ledger.h says how long each takes). No message is sent meanwhile, and
// what is let go of is destroyed after it. Where there is no event's record,
// the questions about events take no lock.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "metal/ledger.h"
#include "metal/self_waits.h"

namespace mlx_safe::metal {

// Where no comment says more, the function of Ledger or SelfWaits that has its
// name, for the calling thread and for now.
class SharedLedger {
 public:
  void track_failures(bool on);
  void forget_buffer(Id buffer);
  void forget_queue(Id queue);
  void forget_event(Id event);

  void signal_encoded(Id buffer, Id event, std::uint64_t value);
  void wait_encoded(Id buffer, Id event, std::uint64_t value);
  void committed(Id buffer, Id queue);
  BufferRef find(Id buffer);
  // Metal's completion thread, or the one that commits when the device
  // completes at once.
  BufferRef completed(Id buffer, FailureRef own);

  // Wait until what makes `event` reach `value` has settled, and until `buffer`
  // has. False when that took longer than `limit`, of which time in which this
  // process did not run is no part. Not for Metal's threads.
  bool settle_event(Id event, std::uint64_t value, std::uint64_t real,
                    std::chrono::milliseconds limit);
  bool settle_buffer(const BufferRef& buffer, std::chrono::milliseconds limit);

  bool is_encoding_here();
  std::vector<WaitRef> awaited_from_here();
  std::vector<WaitRef> waits_in_flight();
  SelfWaits::HeldUp held_up_by(Id event, std::uint64_t value,
                               const SelfWaits::Reached& reached,
                               std::chrono::milliseconds age,
                               std::chrono::milliseconds recent);
  void give_up_on(const std::vector<WaitRef>& open_signals);

  bool is_pending_beyond(Id event, std::uint64_t value);
  std::uint64_t settled_value(Id event, std::uint64_t real);
  std::uint64_t visible(Id event, std::uint64_t real);
  FailureRef failure_of(Id event, std::uint64_t value);
  FailureRef unraised_on(Id queue);
  void raised(const FailureRef& failure);
  void signalled_by_cpu(Id event, std::uint64_t value,
                        const FailureRef& failure);
  // The thread that installs or uninstalls.
  void forget_failures();

  // Records held now: buffers, events.
  std::pair<std::size_t, std::size_t> sizes();
  // The one thread of a forked child; takes no lock, allocates nothing.
  void reset_after_fork() noexcept;

 private:
  class Locked;
  bool has_events() const {
    return event_count_.load(std::memory_order_acquire) != 0;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<std::size_t> event_count_{0};  // ledger_'s, without the lock
  Ledger ledger_;
  SelfWaits self_waits_{ledger_};
};

}  // namespace mlx_safe::metal
