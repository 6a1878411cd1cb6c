#include "metal/ledger.h"

#include <algorithm>
#include <iterator>
#include <utility>

// Any thread, with SharedLedger's lock; none of it in the crash path. R1 to R12
// are the rules of ledger.h.

namespace mlx_safe::metal {
namespace {

// One event's failed values beyond this are merged; MLX makes an event for each
// evaluation, so it takes a fence with this many failures.
constexpr std::size_t kPoisonsMax = 64;

// Failures that one may stand for; of more, the last are raised by themselves.
constexpr std::size_t kCameBeforeMax = 32;

// R8: who raises `failure` raises `before`, and what that stands for, too.
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

}  // namespace

// R12: this and the next two.
void Ledger::forget_buffer(Id buffer) {
  auto it = buffers_.find(buffer);
  // One in flight is alive: Metal calls its handlers yet.
  if (it == buffers_.end()) return;
  if (it->second->sequence != 0 && !it->second->completed) return;
  trash_.push_back(std::move(it->second));
  buffers_.erase(it);
}

void Ledger::forget_queue(Id queue) {
  auto it = queues_.find(queue);
  if (it == queues_.end()) return;
  if (it->second->in_flight.empty()) {
    trash_.push_back(std::move(it->second));
  } else {
    leaving_.push_back(std::move(it->second));
  }
  queues_.erase(it);
}

void Ledger::forget_event(Id event) {
  auto it = events_.find(event);
  if (it == events_.end()) return;
  trash_.push_back(std::make_shared<Event>(std::move(it->second)));
  events_.erase(it);
}

BufferRef& Ledger::open(Id buffer, std::thread::id by, TimePoint now) {
  BufferRef& record = buffers_[buffer];
  // One that is completed is another; its queue has it still.
  if (!record || record->completed) {
    if (record) trash_.push_back(std::move(record));
    record = std::make_shared<Buffer>();
    record->address = buffer;
    record->encoder = by;
    record->opened = now;
  }
  return record;
}

void Ledger::signal_encoded(Id buffer, objc::Owned event, std::uint64_t value,
                            const Encoder& by) {
  BufferRef& record = open(buffer, by.thread, by.now);
  record->signals.push_back({std::move(event), value, record->waits.size()});
}

void Ledger::wait_encoded(Id buffer, objc::Owned event, std::uint64_t value,
                          const Encoder& by) {
  open(buffer, by.thread, by.now)->waits.push_back({std::move(event), value});
}

void Ledger::committed(Id buffer, Id queue, std::thread::id by) {
  // The time does not matter: only one that is not committed is asked for it.
  BufferRef& record = open(buffer, by, TimePoint());
  std::shared_ptr<Queue>& q = queues_[queue];
  if (!q) q = std::make_shared<Queue>();
  record->queue = q;
  record->sequence = ++q->committed;
  q->in_flight.push_back(record);
  for (const Signal& signal : record->signals) {
    bool before_wait = signal.waits_before < record->waits.size();
    std::uint64_t need = record->sequence - (before_wait ? 1 : 0);  // R2
    events_[signal.event.get()].pending.push_back({signal.value, record, need});
  }
  if (q->in_flight.size() == 1) mark_early(*record);
}

BufferRef Ledger::find(Id buffer) const {
  auto it = buffers_.find(buffer);
  if (it == buffers_.end() || it->second->sequence == 0) return nullptr;
  return it->second;
}

const Ledger::Event* Ledger::find_event(Id event) const {
  auto it = events_.find(event);
  return it == events_.end() ? nullptr : &it->second;
}

BufferRef Ledger::completed(Id buffer, FailureRef own) {
  // It stays until it has settled, for a thread that waits for it only now.
  BufferRef record = find(buffer);
  if (!record) return nullptr;
  record->completed = true;
  if (tracking_ && own) {
    for (const Signal& s : record->signals) {  // R4
      std::uint64_t from = s.reached < s.value ? s.reached + 1 : s.value;
      mark(s.event.get(), from, s.value, own);
    }
  }
  record->own = std::move(own);
  advance();
  return record;
}

// Settles whatever can be (R1).
void Ledger::advance() {
  for (bool again = true; again;) {
    again = false;
    for (auto& [address, queue] : queues_) again |= advance(*queue);
    for (auto& queue : leaving_) again |= advance(*queue);
  }
  std::erase_if(leaving_, [&](auto& queue) {
    if (!queue->in_flight.empty()) return false;
    trash_.push_back(std::move(queue));
    return true;
  });
}

bool Ledger::advance(Queue& queue) {
  bool any = false;
  while (!queue.in_flight.empty() && may_settle(*queue.in_flight.front())) {
    settle(queue.in_flight.front());
    any = true;
  }
  return any;
}

// R1, of the first buffer of a queue.
bool Ledger::may_settle(const Buffer& buffer) const {
  if (!buffer.completed) return false;
  for (const Wait& wait : buffer.waits)
    for (const Pending* keeper : keepers_of(buffer, wait)) {
      if (keeper->value <= wait.value) return false;
      // One beyond the value is a guess: the value may have come before, and
      // the event's record have gone. The guess is wrong, or does not matter,
      // when the two would wait for each other.
      if (keeper->buffer->completed && !rests_on(*keeper->buffer, buffer))
        return false;
    }
  return true;
}

// The unsettled signals that a wait of `buffer` depends on (R3).
std::vector<const Ledger::Pending*> Ledger::keepers_of(const Buffer& buffer,
                                                       const Wait& wait) const {
  std::vector<const Pending*> keepers;
  const Event* event = find_event(wait.event.get());
  if (event == nullptr || event->settled >= wait.value) return keepers;
  bool up_to = false;
  const Pending* beyond = nullptr;
  for (const Pending& p : event->pending) {
    // A later buffer of the same queue cannot have been waited for.
    if (p.buffer->queue == buffer.queue &&
        p.buffer->sequence >= buffer.sequence)
      continue;
    if (p.value <= wait.value) {
      up_to = true;
      if (!is_settled(p)) keepers.push_back(&p);
    } else if (beyond == nullptr || p.value < beyond->value) {
      beyond = &p;
    }
  }
  if (!up_to && beyond != nullptr && !is_settled(*beyond))
    keepers.push_back(beyond);
  return keepers;
}

// Whether `buffer` cannot settle before `other`, over any number of others.
// Over guesses, of which one is wrong, that is so when all of them have
// completed: nothing else will let them settle then.
bool Ledger::rests_on(const Buffer& buffer, const Buffer& other) const {
  Search known{other, false}, guessed{other, true};
  look(buffer, known);
  if (known.is_found) return true;
  look(buffer, guessed);
  return guessed.is_found && !guessed.is_open;
}

void Ledger::look(const Buffer& buffer, Search& search) const {
  for (const BufferRef& before : buffer.queue->in_flight) {
    if (before->sequence > buffer.sequence) return;
    if (before.get() == &search.other) {
      search.is_found = true;
      return;
    }
    if (!before->completed) {
      search.is_open = true;
      return;
    }
    if (!search.seen.insert(before.get()).second) continue;
    for (const Wait& wait : before->waits)
      for (const Pending* keeper : keepers_of(*before, wait))
        if (search.guesses || keeper->value <= wait.value)
          look(*keeper->buffer, search);
  }
}

void Ledger::settle(const BufferRef& front) {
  BufferRef buffer = front;
  Queue& queue = *buffer->queue;
  FailureRef why = tracking_ ? inherited(*buffer) : nullptr;
  buffer->settled = true;
  queue.settled = buffer->sequence;
  queue.in_flight.pop_front();
  if (!queue.in_flight.empty()) mark_early(*queue.in_flight.front());
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
    if (why) mark(address, signal.value, signal.value, why);
    drop_if_idle(address);
  }
  trash_.push_back(std::move(buffer));
}

// Why a buffer's results are not to be trusted; null when they are. Its own
// failure, one that came in (R7) and what stayed (R5, R6); it stays on.
FailureRef Ledger::inherited(const Buffer& buffer) {
  Queue& queue = *buffer.queue;
  FailureRef why = buffer.own;
  if (why) {
    stands_for(why, queue.unraised);
    for (const Wait& wait : buffer.waits)
      stands_for(why, failure_of(wait.event.get(), wait.value));
  }
  if (!why && queue.unraised) return queue.unraised;
  if (!why && buffer.sequence <= queue.tainted_until) return queue.taint;
  for (const Wait& wait : buffer.waits) {
    if (why) break;
    why = failure_of(wait.event.get(), wait.value);
  }
  if (!why) return nullptr;
  if (!why->raised) {
    trash_.push_back(std::exchange(queue.unraised, why));
  } else {
    trash_.push_back(std::exchange(queue.taint, why));
    queue.tainted_until = queue.committed;
  }
  return why;
}

// R5 and R6, of signals that count from now on (R2): the first buffer in flight
// has not settled, but what stays with the queue is known.
void Ledger::mark_early(const Buffer& first) {
  const Queue& queue = *first.queue;
  bool is_tainted = first.sequence <= queue.tainted_until;
  if (!queue.unraised && !is_tainted) return;
  FailureRef why = queue.unraised;
  if (!why && is_tainted) why = queue.taint;
  if (!why) return;
  for (const Signal& signal : first.signals)
    if (signal.waits_before < first.waits.size())
      mark(signal.event.get(), signal.value, signal.value, why);
}

void Ledger::mark(Id event, std::uint64_t from, std::uint64_t to,
                  const FailureRef& failure) {
  auto& poisons = events_[event].poisons;
  for (Poison& p : poisons)
    if (p.from <= from && to <= p.to) return;
  if (poisons.size() >= kPoisonsMax) {
    Poison& first = poisons.front();
    first.from = std::min(first.from, poisons[1].from);
    first.to = std::max(first.to, poisons[1].to);
    trash_.push_back(std::move(poisons[1].failure));
    poisons.erase(poisons.begin() + 1);
  }
  poisons.push_back({from, to, failure});
}

void Ledger::drop_if_idle(Id event) {
  auto it = events_.find(event);
  if (it != events_.end() && it->second.pending.empty() &&
      it->second.poisons.empty())
    events_.erase(it);
}

bool Ledger::is_settled(const Pending& p) {
  return p.buffer->settled || p.buffer->queue->settled >= p.need;
}

// R2, of an event that shows `real`. When a later buffer of the queue has
// signalled, this one is through, and may have failed. Its signal may have been
// withheld, and does not count before its buffer has settled.
bool Ledger::counts(const Event& event, const Pending& signal,
                    std::uint64_t real) {
  return is_settled(signal) &&
         std::none_of(event.pending.begin(), event.pending.end(),
                      [&](const Pending& p) {
                        return p.buffer->queue == signal.buffer->queue &&
                               p.buffer->sequence > signal.buffer->sequence &&
                               p.value <= real;
                      });
}

// R3. Not by later signals that have come, too: a failed buffer's come before
// their time, and its next wait may be for the thread that waits here.
bool Ledger::is_closed(Id address, std::uint64_t value,
                       std::uint64_t real) const {
  const Event* event = find_event(address);
  if (event == nullptr || event->settled >= value) return false;
  bool up_to = false;
  const Pending* beyond = nullptr;
  for (const Pending& p : event->pending) {
    if (p.value <= value) {
      up_to = true;
      if (!counts(*event, p, real)) return true;
    } else if (p.value <= real &&
               (beyond == nullptr || p.value < beyond->value)) {
      beyond = &p;
    }
  }
  return !up_to && beyond != nullptr && !counts(*event, *beyond, real);
}

// R11.
bool Ledger::is_pending_beyond(Id address, std::uint64_t value) const {
  const Event* event = find_event(address);
  return event != nullptr &&
         std::any_of(event->pending.begin(), event->pending.end(),
                     [&](const Pending& p) { return p.value > value; });
}

// R10.
std::uint64_t Ledger::settled_value(const Event& event, std::uint64_t real) {
  std::uint64_t shown = real;
  for (const Pending& p : event.pending)
    if (p.value <= real && p.value > event.settled && !counts(event, p, real))
      shown = std::min(shown, p.value - 1);
  return shown;
}

std::uint64_t Ledger::settled_value(Id address, std::uint64_t real) const {
  const Event* event = find_event(address);
  return event == nullptr ? real : settled_value(*event, real);
}

std::uint64_t Ledger::visible(Id address, std::uint64_t real) const {
  const Event* event = find_event(address);
  if (event == nullptr) return real;
  std::uint64_t shown = settled_value(*event, real);
  for (const Poison& p : event->poisons)
    if (p.from <= shown) shown = p.from - 1;
  return shown;
}

FailureRef Ledger::failure_of(Id address, std::uint64_t value) const {
  const Event* event = find_event(address);
  if (event == nullptr) return nullptr;
  for (const Poison& p : event->poisons)
    if (p.from <= value && value <= p.to) return p.failure;
  return nullptr;
}

FailureRef Ledger::unraised_on(Id queue) const {
  auto it = queues_.find(queue);
  return it == queues_.end() ? nullptr : it->second->unraised;
}

void Ledger::raised(const FailureRef& failure) {
  raise_on_queues(failure);
  for (const auto& one : failure->came_before) {  // R8
    FailureRef before = one.lock();
    if (!before) continue;
    raise_on_queues(before);
    trash_.push_back(std::move(before));
  }
}

// R6.
void Ledger::raise_on_queues(const FailureRef& failure) {
  if (failure->raised.exchange(true)) return;
  for (auto& [address, queue] : queues_) {
    if (queue->unraised != failure) continue;
    trash_.push_back(std::move(queue->taint));
    queue->taint = std::move(queue->unraised);
    queue->tainted_until = queue->committed;
  }
}

// R9.
void Ledger::signalled_by_cpu(Id address, std::uint64_t value,
                              const FailureRef& failure) {
  if (failure) return mark(address, value, value, failure);
  auto it = events_.find(address);
  if (it == events_.end()) return;
  Event& event = it->second;
  // MLX 0.32 signals for a failed buffer in a handler of its own, and the
  // failure is not counted yet: such a value settles with its buffer.
  bool of_a_buffer = std::any_of(
      event.pending.begin(), event.pending.end(),
      [&](const Pending& p) { return p.value <= value && !is_settled(p); });
  if (!of_a_buffer) event.settled = std::max(event.settled, value);
}

void Ledger::forget_failures() {
  for (auto it = buffers_.begin(); it != buffers_.end();) {
    if (it->second->sequence != 0) {
      ++it;
      continue;
    }
    trash_.push_back(std::move(it->second));
    it = buffers_.erase(it);
  }
  for (auto& [address, queue] : queues_) {
    trash_.push_back(std::move(queue->unraised));
    trash_.push_back(std::move(queue->taint));
    queue->tainted_until = 0;
  }
  for (auto it = events_.begin(); it != events_.end();) {
    for (Poison& p : it->second.poisons) trash_.push_back(std::move(p.failure));
    it->second.poisons.clear();
    it = it->second.pending.empty() ? events_.erase(it) : std::next(it);
  }
}

}  // namespace mlx_safe::metal
