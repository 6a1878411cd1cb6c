#include "metal/ledger.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace mlx_safe::metal {
namespace {

// One event's failed values beyond this are merged; MLX makes an event for each
// evaluation, so it takes a fence with this many failures.
constexpr std::size_t kPoisonsMax = 64;

// Failures that one may stand for; of more, the last are told by themselves.
constexpr std::size_t kCameBeforeMax = 32;

// With the ledger's lock, so that none is let go of here.
void stands_for(const FailureRef& failure, const FailureRef& before) {
  auto add = [&](const std::weak_ptr<Failure>& one) {
    bool itself = !one.owner_before(failure) && !failure.owner_before(one);
    if (!itself && !one.expired() &&
        failure->came_before.size() < kCameBeforeMax)
      failure->came_before.push_back(one);
  };
  if (!before || before == failure) return;
  add(before);
  for (const auto& one : before->came_before) add(one);
}

// Not on Metal's threads, which it would hold up; gives the lock back
// meanwhile. Waits until `good()`, in slices: while the process is stopped or
// the machine sleeps the handlers do not run either, and that costs one slice
// only.
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

// Unless it is said below, each function may be called on any thread, Metal's
// included, takes the lock (the private ones want it held by their caller), and
// is not for the crash path.

void Ledger::forget_buffer(Id buffer) {
  BufferRef old;
  std::lock_guard lock(mutex_);
  auto it = buffers_.find(buffer);
  // One in flight is alive: Metal calls its handlers yet.
  if (it == buffers_.end()) return;
  if (it->second->sequence != 0 && !it->second->completed) return;
  old = std::move(it->second);
  buffers_.erase(it);
}

void Ledger::forget_queue(Id queue) {
  std::shared_ptr<Queue> old;
  std::lock_guard lock(mutex_);
  auto it = queues_.find(queue);
  if (it == queues_.end()) return;
  old = std::move(it->second);
  queues_.erase(it);
  if (!old->in_flight.empty()) leaving_.push_back(old);
}

void Ledger::forget_event(Id event) {
  if (event_count_.load() == 0) return;
  Event old;
  std::lock_guard lock(mutex_);
  auto it = events_.find(event);
  if (it == events_.end()) return;
  old = std::move(it->second);
  events_.erase(it);
  event_count_.store(events_.size());
}

BufferRef& Ledger::open(Id buffer) {
  BufferRef& record = buffers_[buffer];
  // One that is completed is another; its queue has it still.
  if (!record || record->completed) {
    record = std::make_shared<Buffer>();
    record->address = buffer;
    record->encoder = std::this_thread::get_id();
    record->opened = std::chrono::steady_clock::now();
  }
  return record;
}

void Ledger::signal_encoded(Id buffer, Id event, std::uint64_t value) {
  objc::Owned held = objc::Owned::retaining(event);
  std::lock_guard lock(mutex_);
  BufferRef& record = open(buffer);
  record->signals.push_back({std::move(held), value, record->waits.size()});
}

void Ledger::wait_encoded(Id buffer, Id event, std::uint64_t value) {
  objc::Owned held = objc::Owned::retaining(event);
  std::lock_guard lock(mutex_);
  open(buffer)->waits.push_back({std::move(held), value});
}

void Ledger::committed(Id buffer, Id queue) {
  std::lock_guard lock(mutex_);
  BufferRef& record = open(buffer);
  std::shared_ptr<Queue>& q = queues_[queue];
  if (!q) q = std::make_shared<Queue>();
  record->queue = q;
  record->sequence = ++q->committed;
  q->in_flight.push_back(record);
  for (const Signal& signal : record->signals) {
    bool before_wait = signal.waits_before < record->waits.size();
    std::uint64_t need = record->sequence - (before_wait ? 1 : 0);
    events_[signal.event.get()].pending.push_back({signal.value, record, need});
  }
  event_count_.store(events_.size());
}

BufferRef Ledger::find(Id buffer) {
  std::lock_guard lock(mutex_);
  auto it = buffers_.find(buffer);
  if (it == buffers_.end() || it->second->sequence == 0) return nullptr;
  return it->second;
}

// Metal's completion thread, or the one that commits when the device completes
// at once.
BufferRef Ledger::completed(Id buffer, FailureRef own) {
  Trash trash;
  BufferRef record;
  {
    std::lock_guard lock(mutex_);
    auto it = buffers_.find(buffer);
    if (it == buffers_.end() || it->second->sequence == 0) return nullptr;
    // It stays until it has settled, for whoever waits for it only now.
    record = it->second;
    record->completed = true;
    if (tracking_ && own) {
      // Before anybody can see the signals that were withheld.
      for (const Signal& s : record->signals) {
        std::uint64_t from = s.reached < s.value ? s.reached + 1 : s.value;
        mark(s.event.get(), from, s.value, own, &trash);
      }
    }
    if (own) note_failure_of(record->encoder);
    record->own = std::move(own);
    advance(&trash);
  }
  changed_.notify_all();
  return record;
}

// Settles whatever can be: buffers settle in the order of their queue, after
// the handlers of the buffers that they waited for.
void Ledger::advance(Trash* trash) {
  for (bool again = true; again;) {
    again = false;
    for (auto& [address, queue] : queues_) again |= advance(*queue, trash);
    for (auto& queue : leaving_) again |= advance(*queue, trash);
  }
  std::erase_if(leaving_, [&](auto& queue) {
    if (!queue->in_flight.empty()) return false;
    trash->push_back(std::move(queue));
    return true;
  });
}

bool Ledger::advance(Queue& queue, Trash* trash) {
  bool any = false;
  while (!queue.in_flight.empty() && may_settle(*queue.in_flight.front())) {
    settle(queue.in_flight.front(), trash);
    any = true;
  }
  return any;
}

bool Ledger::may_settle(const Buffer& buffer) {
  if (!buffer.completed) return false;
  for (const Wait& wait : buffer.waits) {
    auto it = events_.find(wait.event.get());
    if (it == events_.end() || it->second.settled >= wait.value) continue;
    // Whoever signalled the value: the last one up to it, or the first beyond.
    bool up_to = false;
    const Pending* beyond = nullptr;
    for (const Pending& p : it->second.pending) {
      // A later buffer of the same queue cannot have been waited for.
      if (p.buffer->queue == buffer.queue &&
          p.buffer->sequence >= buffer.sequence)
        continue;
      if (p.value <= wait.value) {
        up_to = true;
        if (!is_settled(p)) return false;
      } else if (beyond == nullptr || p.value < beyond->value) {
        beyond = &p;
      }
    }
    if (!up_to && beyond != nullptr && beyond->buffer->completed &&
        !is_settled(*beyond))
      return false;
  }
  return true;
}

void Ledger::settle(const BufferRef& front, Trash* trash) {
  BufferRef buffer = front;
  Queue& queue = *buffer->queue;
  FailureRef why = tracking_ ? inherited(*buffer, trash) : nullptr;
  buffer->settled = true;
  queue.settled = buffer->sequence;
  queue.in_flight.pop_front();
  if (auto it = buffers_.find(buffer->address);
      it != buffers_.end() && it->second == buffer)
    buffers_.erase(it);
  for (const Signal& signal : buffer->signals) {
    Id address = signal.event.get();
    auto it = events_.find(address);
    if (it != events_.end()) {
      auto& pending = it->second.pending;
      std::erase_if(pending,
                    [&](const Pending& p) { return p.buffer == buffer; });
      it->second.settled = std::max(it->second.settled, signal.value);
    }
    if (why) mark(address, signal.value, signal.value, why, trash);
    drop_if_idle(address);
  }
  trash->push_back(std::move(buffer));
}

// Why a buffer's results are not to be trusted; null when they are. A failure
// that comes in with it stays on its queue.
FailureRef Ledger::inherited(const Buffer& buffer, Trash* trash) {
  Queue& queue = *buffer.queue;
  FailureRef why = buffer.own;
  if (why) {
    stands_for(why, queue.untold);
    for (const Wait& wait : buffer.waits)
      stands_for(why, poison_of(wait.event.get(), wait.value));
  }
  if (!why && queue.untold) return queue.untold;
  if (!why && buffer.sequence <= queue.tainted_until) return queue.taint;
  for (const Wait& wait : buffer.waits) {
    if (why) break;
    why = poison_of(wait.event.get(), wait.value);
  }
  if (!why) return nullptr;
  if (!why->told) {
    trash->push_back(std::exchange(queue.untold, why));
  } else {
    trash->push_back(std::exchange(queue.taint, why));
    queue.tainted_until = queue.committed;
  }
  return why;
}

void Ledger::mark(Id event, std::uint64_t from, std::uint64_t to,
                  const FailureRef& failure, Trash* trash) {
  auto& poisons = events_[event].poisons;
  for (Poison& p : poisons)
    if (p.from <= from && to <= p.to) return;
  if (poisons.size() >= kPoisonsMax) {
    Poison& first = poisons.front();
    first.from = std::min(first.from, poisons[1].from);
    first.to = std::max(first.to, poisons[1].to);
    trash->push_back(std::move(poisons[1].failure));
    poisons.erase(poisons.begin() + 1);
  }
  poisons.push_back({from, to, failure});
  event_count_.store(events_.size());
}

void Ledger::drop_if_idle(Id event) {
  auto it = events_.find(event);
  if (it == events_.end() || !it->second.pending.empty() ||
      !it->second.poisons.empty())
    return;
  events_.erase(it);
  event_count_.store(events_.size());
}

bool Ledger::is_settled(const Pending& p) {
  return p.buffer->settled || p.buffer->queue->settled >= p.need;
}

// By what signalled `value`: all up to it, or else the first beyond. Not by
// later signals that have come, too: a failed buffer's come before their time,
// and may be waiting for whoever waits here.
bool Ledger::is_closed(const Event& event, std::uint64_t value,
                       std::uint64_t real) {
  if (event.settled >= value) return false;
  bool up_to = false;
  const Pending* beyond = nullptr;
  for (const Pending& p : event.pending) {
    if (p.value <= value) {
      up_to = true;
      if (!is_settled(p)) return true;
    } else if (p.value <= real &&
               (beyond == nullptr || p.value < beyond->value)) {
      beyond = &p;
    }
  }
  return !up_to && beyond != nullptr && !is_settled(*beyond);
}

// This and the next wait: not for Metal's threads.
bool Ledger::settle_event(Id event, std::uint64_t value, std::uint64_t real,
                          std::chrono::milliseconds limit) {
  if (event_count_.load() == 0) return true;
  std::unique_lock lock(mutex_);
  return wait_in_slices(changed_, lock, limit, [&] {
    auto it = events_.find(event);
    return it == events_.end() || !is_closed(it->second, value, real);
  });
}

bool Ledger::settle_buffer(const BufferRef& buffer,
                           std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  return wait_in_slices(changed_, lock, limit, [&] { return buffer->settled; });
}

void Ledger::wait_skipped(Id event, std::uint64_t value) {
  auto wait =
      std::make_shared<const Wait>(Wait{objc::Owned::retaining(event), value});
  std::lock_guard lock(mutex_);
  skipped_.push_back(std::move(wait));
  any_skipped_ = true;
}

std::vector<Ledger::WaitRef> Ledger::skipped_waits() {
  if (!any_skipped_.load()) return {};
  std::lock_guard lock(mutex_);
  return skipped_;
}

void Ledger::forget_skipped(const WaitRef& wait) {
  std::lock_guard lock(mutex_);
  std::erase(skipped_, wait);
  any_skipped_ = !skipped_.empty();
}

bool Ledger::is_pending_beyond(Id event, std::uint64_t value) {
  if (event_count_.load() == 0) return false;
  std::lock_guard lock(mutex_);
  auto it = events_.find(event);
  return it != events_.end() &&
         std::any_of(it->second.pending.begin(), it->second.pending.end(),
                     [&](const Pending& p) { return p.value > value; });
}

std::uint64_t Ledger::settled_value(const Event& event, std::uint64_t real) {
  std::uint64_t shown = real;
  for (const Pending& p : event.pending)
    if (p.value <= real && p.value > event.settled && !is_settled(p))
      shown = std::min(shown, p.value - 1);
  return shown;
}

std::uint64_t Ledger::settled_value(Id event, std::uint64_t real) {
  if (real == 0 || event_count_.load() == 0) return real;
  std::lock_guard lock(mutex_);
  auto it = events_.find(event);
  return it == events_.end() ? real : settled_value(it->second, real);
}

std::uint64_t Ledger::visible(Id event, std::uint64_t real) {
  if (real == 0 || event_count_.load() == 0) return real;
  std::lock_guard lock(mutex_);
  auto it = events_.find(event);
  if (it == events_.end()) return real;
  std::uint64_t shown = settled_value(it->second, real);
  for (const Poison& p : it->second.poisons)
    if (p.from <= shown) shown = p.from - 1;
  return shown;
}

FailureRef Ledger::poison_of(Id event, std::uint64_t value) {
  auto it = events_.find(event);
  if (it == events_.end()) return nullptr;
  for (const Poison& p : it->second.poisons)
    if (p.from <= value && value <= p.to) return p.failure;
  return nullptr;
}

FailureRef Ledger::failure_of(Id event, std::uint64_t value) {
  if (event_count_.load() == 0) return nullptr;
  std::lock_guard lock(mutex_);
  return poison_of(event, value);
}

FailureRef Ledger::untold_on(Id queue) {
  std::lock_guard lock(mutex_);
  auto it = queues_.find(queue);
  return it == queues_.end() ? nullptr : it->second->untold;
}

void Ledger::tell(const FailureRef& failure) {
  Trash trash;
  std::lock_guard lock(mutex_);
  tell_queues(failure, &trash);
  for (const auto& one : failure->came_before) {
    FailureRef before = one.lock();
    if (!before) continue;
    tell_queues(before, &trash);
    trash.push_back(std::move(before));
  }
}

void Ledger::tell_queues(const FailureRef& failure, Trash* trash) {
  if (failure->told.exchange(true)) return;
  for (auto& [address, queue] : queues_) {
    if (queue->untold != failure) continue;
    trash->push_back(std::move(queue->taint));
    queue->taint = std::move(queue->untold);
    queue->untold = nullptr;
    queue->tainted_until = queue->committed;
  }
}

void Ledger::signalled_by_cpu(Id event, std::uint64_t value,
                              const FailureRef& failure) {
  if (!failure && event_count_.load() == 0) return;
  Trash trash;
  {
    std::lock_guard lock(mutex_);
    if (failure) {
      mark(event, value, value, failure, &trash);
    } else if (auto it = events_.find(event); it != events_.end()) {
      Event& e = it->second;
      // MLX 0.32 signals for a failed buffer in a handler of its own, and the
      // failure is not counted yet: such a value settles with its buffer.
      bool of_a_buffer = std::any_of(
          e.pending.begin(), e.pending.end(),
          [&](const Pending& p) { return p.value <= value && !is_settled(p); });
      if (!of_a_buffer) e.settled = std::max(e.settled, value);
    }
  }
  changed_.notify_all();
}

// The thread that installs or uninstalls.
void Ledger::forget_failures() {
  Trash trash;
  std::lock_guard lock(mutex_);
  for (auto it = buffers_.begin(); it != buffers_.end();) {
    if (it->second->sequence != 0) {
      ++it;
      continue;
    }
    trash.push_back(std::move(it->second));
    it = buffers_.erase(it);
  }
  for (auto& [address, queue] : queues_) {
    trash.push_back(std::move(queue->untold));
    trash.push_back(std::move(queue->taint));
    queue->tainted_until = 0;
  }
  for (auto it = events_.begin(); it != events_.end();) {
    for (Poison& p : it->second.poisons) trash.push_back(std::move(p.failure));
    it->second.poisons.clear();
    it = it->second.pending.empty() ? events_.erase(it) : std::next(it);
  }
  event_count_.store(events_.size());
  for (WaitRef& wait : skipped_)
    trash.push_back(std::const_pointer_cast<Wait>(std::move(wait)));
  skipped_.clear();
  any_skipped_ = false;
}

std::pair<std::size_t, std::size_t> Ledger::sizes() {
  std::lock_guard lock(mutex_);
  return {buffers_.size(), events_.size()};
}

// The one thread of a forked child; takes no lock, allocates nothing.
void Ledger::reset_after_fork() noexcept {
  // Another thread of the parent may have held the lock, and what it guards may
  // be half changed: left where it is, and begun anew.
  new (this) Ledger;
}

}  // namespace mlx_safe::metal
