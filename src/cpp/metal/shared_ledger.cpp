#include "metal/shared_ledger.h"

#include <new>
#include <thread>

#ifdef MLX_SAFE_CHECK_INVARIANTS
#include "ledger_inspector.h"  // of tests/native
#endif

// Which thread may call what is said in shared_ledger.h.

namespace mlx_safe::metal {
namespace {

using Clock = std::chrono::steady_clock;

Ledger::Encoder here() { return {std::this_thread::get_id(), Clock::now()}; }

// Waits until `good()`, and gives the lock back meanwhile. In slices: while the
// process is stopped or the machine sleeps the handlers do not run either, and
// that costs one slice only. Not on Metal's threads.
template <class Good>
bool wait_in_slices(std::condition_variable& changed,
                    std::unique_lock<std::mutex>& lock,
                    std::chrono::milliseconds limit, Good good) {
  constexpr std::chrono::milliseconds kSlice{100};
  for (; limit > kSlice; limit -= kSlice)
    if (changed.wait_for(lock, kSlice, good)) return true;
  return changed.wait_for(lock, limit, good);
}

}  // namespace

// One change of the ledger, under the lock.
class SharedLedger::Locked {
 public:
  explicit Locked(SharedLedger& owner) : owner_(owner) { owner.mutex_.lock(); }
  ~Locked() {
    std::size_t count = owner_.ledger_.event_count();
    if (count != owner_.event_count_.load(std::memory_order_relaxed))
      owner_.event_count_.store(count, std::memory_order_release);
#ifdef MLX_SAFE_CHECK_INVARIANTS
    LedgerInspector::check(owner_.ledger_);
#endif
    // Mostly nothing, or the buffer that has settled.
    std::size_t dropped = owner_.ledger_.trash_size();
    if (dropped == 0) {
      owner_.mutex_.unlock();
    } else if (dropped == 1) {
      std::shared_ptr<void> one = owner_.ledger_.take_last_trash();
      owner_.mutex_.unlock();
    } else {
      Ledger::Trash all = owner_.ledger_.take_trash();
      owner_.mutex_.unlock();
    }
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  SharedLedger& owner_;
};

void SharedLedger::track_failures(bool on) {
  Locked locked(*this);
  ledger_.track_failures(on);
}

void SharedLedger::forget_buffer(Id buffer) {
  Locked locked(*this);
  ledger_.forget_buffer(buffer);
}

void SharedLedger::forget_queue(Id queue) {
  Locked locked(*this);
  ledger_.forget_queue(queue);
}

void SharedLedger::forget_event(Id event) {
  if (!has_events()) return;
  Locked locked(*this);
  ledger_.forget_event(event);
}

void SharedLedger::signal_encoded(Id buffer, Id event, std::uint64_t value) {
  objc::Owned held = objc::Owned::retaining(event);
  Ledger::Encoder by = here();
  Locked locked(*this);
  ledger_.signal_encoded(buffer, std::move(held), value, by);
}

void SharedLedger::wait_encoded(Id buffer, Id event, std::uint64_t value) {
  objc::Owned held = objc::Owned::retaining(event);
  Ledger::Encoder by = here();
  Locked locked(*this);
  ledger_.wait_encoded(buffer, std::move(held), value, by);
}

void SharedLedger::committed(Id buffer, Id queue) {
  Locked locked(*this);
  ledger_.committed(buffer, queue, std::this_thread::get_id());
}

BufferRef SharedLedger::find(Id buffer) {
  std::lock_guard lock(mutex_);
  return ledger_.find(buffer);
}

BufferRef SharedLedger::completed(Id buffer, FailureRef own) {
  BufferRef record;
  {
    Locked locked(*this);
    bool failed = own != nullptr;
    record = ledger_.completed(buffer, std::move(own));
    if (record && failed)
      self_waits_.note_failure(record->encoder, Clock::now());
  }
  if (record) changed_.notify_all();
  return record;
}

bool SharedLedger::settle_event(Id event, std::uint64_t value,
                                std::uint64_t real,
                                std::chrono::milliseconds limit) {
  if (!has_events()) return true;
  std::unique_lock lock(mutex_);
  return wait_in_slices(changed_, lock, limit,
                        [&] { return !ledger_.is_closed(event, value, real); });
}

bool SharedLedger::settle_buffer(const BufferRef& buffer,
                                 std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  return wait_in_slices(changed_, lock, limit, [&] { return buffer->settled; });
}

bool SharedLedger::is_encoding_here() {
  std::lock_guard lock(mutex_);
  return self_waits_.is_encoding(std::this_thread::get_id());
}

std::vector<WaitRef> SharedLedger::awaited_from_here() {
  std::lock_guard lock(mutex_);
  return self_waits_.awaited_from(std::this_thread::get_id());
}

std::vector<WaitRef> SharedLedger::waits_in_flight() {
  std::lock_guard lock(mutex_);
  return self_waits_.waits_in_flight();
}

SelfWaits::HeldUp SharedLedger::held_up_by(Id event, std::uint64_t value,
                                           const SelfWaits::Reached& reached,
                                           std::chrono::milliseconds age,
                                           std::chrono::milliseconds recent) {
  std::lock_guard lock(mutex_);
  return self_waits_.held_up_by(event, value, reached,
                                {Clock::now(), age, recent});
}

void SharedLedger::give_up_on(const std::vector<WaitRef>& open_signals) {
  std::lock_guard lock(mutex_);
  self_waits_.give_up_on(open_signals);
}

bool SharedLedger::is_pending_beyond(Id event, std::uint64_t value) {
  if (!has_events()) return false;
  std::lock_guard lock(mutex_);
  return ledger_.is_pending_beyond(event, value);
}

std::uint64_t SharedLedger::settled_value(Id event, std::uint64_t real) {
  if (real == 0 || !has_events()) return real;
  std::lock_guard lock(mutex_);
  return ledger_.settled_value(event, real);
}

std::uint64_t SharedLedger::visible(Id event, std::uint64_t real) {
  if (real == 0 || !has_events()) return real;
  std::lock_guard lock(mutex_);
  return ledger_.visible(event, real);
}

FailureRef SharedLedger::failure_of(Id event, std::uint64_t value) {
  if (!has_events()) return nullptr;
  std::lock_guard lock(mutex_);
  return ledger_.failure_of(event, value);
}

FailureRef SharedLedger::unraised_on(Id queue) {
  std::lock_guard lock(mutex_);
  return ledger_.unraised_on(queue);
}

void SharedLedger::raised(const FailureRef& failure) {
  Locked locked(*this);
  ledger_.raised(failure);
}

void SharedLedger::signalled_by_cpu(Id event, std::uint64_t value,
                                    const FailureRef& failure) {
  if (!failure && !has_events()) return;
  {
    Locked locked(*this);
    ledger_.signalled_by_cpu(event, value, failure);
  }
  changed_.notify_all();
}

void SharedLedger::forget_failures() {
  Locked locked(*this);
  ledger_.forget_failures();
}

std::pair<std::size_t, std::size_t> SharedLedger::sizes() {
  std::lock_guard lock(mutex_);
  return {ledger_.buffers().size(), ledger_.event_count()};
}

void SharedLedger::reset_after_fork() noexcept {
  // Another thread of the parent may have held the lock, and what it guards may
  // be half changed: left where it is, and begun anew.
  new (this) SharedLedger;
}

}  // namespace mlx_safe::metal
