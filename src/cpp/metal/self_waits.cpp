#include "metal/self_waits.h"

#include <algorithm>
#include <memory>
#include <unordered_set>
#include <utility>

namespace mlx_safe::metal {
namespace {

// Threads whose last failure is remembered; the one that is longest ago goes.
constexpr std::size_t kFailedForMax = 16;

bool is_in_flight(const Buffer& buffer) {
  return buffer.sequence != 0 && !buffer.completed;
}

WaitRef wait_for(Id event, std::uint64_t value) {
  return std::make_shared<const Wait>(
      Wait{objc::Owned::retaining(event), value});
}

// One look at what is open and in flight (R15).
class Look {
 public:
  using Buffers = std::vector<const Buffer*>;  // each queue's in its order

  Look(Buffers buffers, const SelfWaits::Reached& reached)
      : buffers_(std::move(buffers)), reached_(reached) {
    // In rounds, until no more of them is found to stand.
    while (find_standing()) {
    }
  }

  struct Root {
    Wait wait;
    const Buffer* open;
  };

  // The open signals that hold up `event` on its way to `value`; none when it
  // is not held up.
  std::vector<Root> roots(Id event, std::uint64_t value) {
    std::vector<Root> found;
    if (is_held(event, value)) follow(event, value, &found);
    return found;
  }

 private:
  // A buffer in flight stands at its first wait that is held up; behind one
  // that stands, at its begin.
  struct Stand {
    bool behind;
    std::size_t wait;
  };

  bool is_reached(Id event, std::uint64_t value) const {
    auto it = reached_.find(event);
    return it != reached_.end() && it->second >= value;
  }

  bool is_stuck(const Buffer& buffer, const Signal& signal) const {
    if (buffer.sequence == 0) return true;
    auto it = stands_.find(&buffer);
    return it != stands_.end() &&
           (it->second.behind || it->second.wait < signal.waits_before);
  }

  // A value that no buffer here signals may come from a CPU: a wait for it is
  // not held up.
  bool is_held(Id event, std::uint64_t value) const {
    if (is_reached(event, value)) return false;
    bool found = false;
    for (const Buffer* buffer : buffers_)
      for (const Signal& signal : buffer->signals) {
        if (signal.event.get() != event || signal.value < value) continue;
        if (!is_stuck(*buffer, signal)) return false;
        found = true;
      }
    return found;
  }

  bool find_standing() {
    bool any = false;
    std::unordered_set<const Queue*> standing;
    for (const Buffer* buffer : buffers_) {
      if (buffer->sequence == 0) continue;
      auto known = stands_.find(buffer);
      if (known == stands_.end() || !known->second.behind) {
        bool behind = standing.count(buffer->queue.get()) != 0;
        std::size_t limit =
            known == stands_.end() ? buffer->waits.size() : known->second.wait;
        std::size_t at = 0;
        while (at < limit && !behind && !holds(buffer->waits[at])) ++at;
        if (behind || at < limit) {
          stands_[buffer] = {behind, at};
          any = true;
        }
      }
      if (stands_.count(buffer) != 0) standing.insert(buffer->queue.get());
    }
    return any;
  }

  bool holds(const Wait& wait) const {
    return is_held(wait.event.get(), wait.value);
  }

  // Adds what is open and holds this up, over any number of buffers in flight.
  // The first signal that brings the value is enough. It counts when the lower
  // ones in flight have settled (R3): they are followed, too.
  void follow(Id event, std::uint64_t value, std::vector<Root>* found) {
    std::uint64_t first = ~std::uint64_t{0};
    for (const Buffer* buffer : buffers_)
      for (const Signal& signal : buffer->signals)
        if (signal.event.get() == event && signal.value >= value)
          first = std::min(first, signal.value);
    for (const Buffer* buffer : buffers_)
      for (const Signal& signal : buffer->signals) {
        if (signal.event.get() != event || signal.value > first) continue;
        if (buffer->sequence != 0) {
          follow_waits(*buffer, signal.waits_before, found);
        } else if (signal.value == first) {
          add(event, value, buffer, found);
        }
      }
  }

  // Follows the first `count` waits of a buffer, and all waits of the buffers
  // before it on its queue.
  void follow_waits(const Buffer& last, std::size_t count,
                    std::vector<Root>* found) {
    for (const Buffer* buffer : buffers_) {
      if (buffer->queue != last.queue || buffer->sequence > last.sequence)
        continue;
      std::size_t end = buffer == &last ? count : buffer->waits.size();
      for (std::size_t i = 0; i < end; ++i) {
        const Wait& wait = buffer->waits[i];
        if (followed_.insert(&wait).second && holds(wait))
          follow(wait.event.get(), wait.value, found);
      }
    }
  }

  static void add(Id event, std::uint64_t value, const Buffer* open,
                  std::vector<Root>* found) {
    bool known =
        std::any_of(found->begin(), found->end(), [&](const Root& root) {
          return root.wait.event.get() == event && root.wait.value == value &&
                 root.open == open;
        });
    if (!known)
      found->push_back({{objc::Owned::retaining(event), value}, open});
  }

  Buffers buffers_;
  const SelfWaits::Reached& reached_;
  std::unordered_map<const Buffer*, Stand> stands_;
  std::unordered_set<const Wait*> followed_;
};

}  // namespace

// Each function: any thread, with SharedLedger's lock; not in the crash path.

void SelfWaits::note_failure(std::thread::id encoder, TimePoint now) {
  std::erase_if(failed_for_,
                [&](const auto& failed) { return failed.first == encoder; });
  if (failed_for_.size() == kFailedForMax)
    failed_for_.erase(failed_for_.begin());
  failed_for_.emplace_back(encoder, now);
}

bool SelfWaits::is_encoding(std::thread::id thread) const {
  const auto& buffers = ledger_.buffers();
  return std::any_of(buffers.begin(), buffers.end(), [&](const auto& entry) {
    const Buffer& buffer = *entry.second;
    return buffer.sequence == 0 && !buffer.signals.empty() &&
           buffer.encoder == thread;
  });
}

bool SelfWaits::is_awaited(Id event, std::uint64_t value) const {
  const auto& buffers = ledger_.buffers();
  return std::any_of(buffers.begin(), buffers.end(), [&](const auto& entry) {
    const Buffer& buffer = *entry.second;
    return is_in_flight(buffer) &&
           std::any_of(
               buffer.waits.begin(), buffer.waits.end(), [&](const Wait& wait) {
                 return wait.event.get() == event && wait.value <= value;
               });
  });
}

// R14.
std::vector<WaitRef> SelfWaits::awaited_from(std::thread::id thread) const {
  std::vector<WaitRef> found;
  for (const auto& [address, buffer] : ledger_.buffers()) {
    if (buffer->sequence != 0 || buffer->encoder != thread) continue;
    for (const Signal& signal : buffer->signals)
      if (is_awaited(signal.event.get(), signal.value))
        found.push_back(wait_for(signal.event.get(), signal.value));
  }
  return found;
}

std::vector<WaitRef> SelfWaits::waits_in_flight() const {
  std::vector<WaitRef> found;
  for (const auto& [address, buffer] : ledger_.buffers()) {
    if (!is_in_flight(*buffer)) continue;
    for (const Wait& wait : buffer->waits)
      found.push_back(wait_for(wait.event.get(), wait.value));
  }
  return found;
}

SelfWaits::HeldUp SelfWaits::held_up_by(Id event, std::uint64_t value,
                                        const Reached& reached,
                                        const Times& times) const {
  Look::Buffers buffers;
  for (const auto& [address, buffer] : ledger_.buffers())
    if (!buffer->completed) buffers.push_back(buffer.get());
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer* a, const Buffer* b) {
              return a->sequence < b->sequence;
            });
  HeldUp held;
  std::vector<Look::Root> roots =
      Look(std::move(buffers), reached).roots(event, value);
  if (roots.empty()) return held;
  held.by_failure = held.given_up = true;
  for (Look::Root& root : roots) {
    held.by_failure &= has_failed_around(*root.open, times);
    held.given_up &= root.open->given_up;
    held.by.push_back(std::make_shared<const Wait>(std::move(root.wait)));
  }
  return held;
}

void SelfWaits::give_up_on(const std::vector<WaitRef>& open_signals) {
  for (const auto& [address, buffer] : ledger_.buffers()) {
    if (buffer->sequence != 0) continue;
    for (const Signal& signal : buffer->signals)
      for (const WaitRef& wait : open_signals)
        if (signal.event.get() == wait->event.get() &&
            signal.value >= wait->value)
          buffer->given_up = true;
  }
}

// R16.
bool SelfWaits::has_failed_around(const Buffer& open,
                                  const Times& times) const {
  TimePoint before = times.now - times.age;
  return open.opened <= before &&
         std::any_of(failed_for_.begin(), failed_for_.end(),
                     [&](const auto& failed) {
                       return failed.first == open.encoder &&
                              failed.second >= open.opened - times.recent &&
                              failed.second <= before;
                     });
}

}  // namespace mlx_safe::metal
