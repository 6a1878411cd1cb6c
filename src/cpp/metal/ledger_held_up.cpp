// What is encoded and not committed, and who waits for it.
//
// When MLX 0.32 raises in the midst of an evaluation it waits for its streams
// before it has committed what it has encoded (0.32.1 to 0.32.3: in turn, the
// CPU's first), and whoever waits for one of those signals, or for a committed
// buffer that does, waits for ever: the thread that would commit it waits too.
// Which waits are held up so is found here; what is done about it, in
// hooks.cpp.
#include <algorithm>
#include <unordered_set>
#include <utility>

#include "metal/ledger.h"

namespace mlx_safe::metal {
namespace {

// Threads whose last failure is remembered; the one that is longest ago goes.
constexpr std::size_t kFailedForMax = 16;

bool is_in_flight(const Buffer& buffer) {
  return buffer.sequence != 0 && !buffer.completed;
}

// One look at what is open and in flight; with the ledger's lock, by whoever
// waits for longer than half a second after a failure.
class Look {
 public:
  using Buffers = std::vector<const Buffer*>;  // each queue's in its order

  Look(Buffers buffers, const Ledger::Reached& reached)
      : buffers_(std::move(buffers)), reached_(reached) {
    // In rounds, until no more of them is found to stand. Two that wait for
    // each other alone are held up by nothing that is open, and are not found.
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

  // Who signals nothing here may be a CPU: such a wait is not held up.
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
  // The first signal that brings the value is enough; it counts when lower ones
  // that are in flight have settled (`is_closed`): they are followed, too.
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

  // The same for the first `count` waits of a buffer, and all of those before
  // it on its queue.
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
  const Ledger::Reached& reached_;
  std::unordered_map<const Buffer*, Stand> stands_;
  std::unordered_set<const Wait*> followed_;
};

}  // namespace

// As in ledger.cpp: each function may be called on any thread, Metal's
// included, takes the lock (the private ones want it held by their caller), and
// is not for the crash path.

bool Ledger::is_encoding_here() {
  std::lock_guard lock(mutex_);
  return std::any_of(buffers_.begin(), buffers_.end(), [](const auto& entry) {
    const Buffer& buffer = *entry.second;
    return buffer.sequence == 0 && !buffer.signals.empty() &&
           buffer.encoder == std::this_thread::get_id();
  });
}

bool Ledger::is_awaited(Id event, std::uint64_t value) {
  return std::any_of(buffers_.begin(), buffers_.end(), [&](const auto& entry) {
    const Buffer& buffer = *entry.second;
    return is_in_flight(buffer) &&
           std::any_of(
               buffer.waits.begin(), buffer.waits.end(), [&](const Wait& wait) {
                 return wait.event.get() == event && wait.value <= value;
               });
  });
}

std::vector<Ledger::WaitRef> Ledger::awaited_from_here() {
  std::vector<WaitRef> found;
  std::lock_guard lock(mutex_);
  for (const auto& [address, buffer] : buffers_) {
    if (buffer->sequence != 0 || buffer->encoder != std::this_thread::get_id())
      continue;
    for (const Signal& signal : buffer->signals)
      if (is_awaited(signal.event.get(), signal.value))
        found.push_back(std::make_shared<const Wait>(
            Wait{objc::Owned::retaining(signal.event.get()), signal.value}));
  }
  return found;
}

std::vector<Ledger::WaitRef> Ledger::waits_in_flight() {
  std::vector<WaitRef> found;
  std::lock_guard lock(mutex_);
  for (const auto& [address, buffer] : buffers_) {
    if (!is_in_flight(*buffer)) continue;
    for (const Wait& wait : buffer->waits)
      found.push_back(std::make_shared<const Wait>(
          Wait{objc::Owned::retaining(wait.event.get()), wait.value}));
  }
  return found;
}

Ledger::HeldUp Ledger::held_up_by(Id event, std::uint64_t value,
                                  const Reached& reached,
                                  std::chrono::milliseconds age,
                                  std::chrono::milliseconds recent) {
  HeldUp held;
  std::lock_guard lock(mutex_);
  Look::Buffers buffers;
  for (const auto& [address, buffer] : buffers_)
    if (!buffer->completed) buffers.push_back(buffer.get());
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer* a, const Buffer* b) {
              return a->sequence < b->sequence;
            });
  Look look(std::move(buffers), reached);
  held.by_failure = held.given_up = true;
  for (Look::Root& root : look.roots(event, value)) {
    held.by_failure &= has_failed_around(*root.open, age, recent);
    held.given_up &= root.open->given_up;
    held.by.push_back(std::make_shared<const Wait>(std::move(root.wait)));
  }
  held.by_failure &= !held.by.empty();
  held.given_up &= !held.by.empty();
  return held;
}

void Ledger::give_up_on(const std::vector<WaitRef>& open_signals) {
  std::lock_guard lock(mutex_);
  for (const auto& [address, buffer] : buffers_) {
    if (buffer->sequence != 0) continue;
    for (const Signal& signal : buffer->signals)
      for (const WaitRef& wait : open_signals)
        if (signal.event.get() == wait->event.get() &&
            signal.value >= wait->value)
          buffer->given_up = true;
  }
}

bool Ledger::has_failed_around(const Buffer& open,
                               std::chrono::milliseconds age,
                               std::chrono::milliseconds recent) {
  auto before = std::chrono::steady_clock::now() - age;
  return open.opened <= before &&
         std::any_of(failed_for_.begin(), failed_for_.end(),
                     [&](const auto& failed) {
                       return failed.first == open.encoder &&
                              failed.second >= open.opened - recent &&
                              failed.second <= before;
                     });
}

void Ledger::note_failure_of(std::thread::id encoder) {
  std::erase_if(failed_for_,
                [&](const auto& failed) { return failed.first == encoder; });
  if (failed_for_.size() == kFailedForMax)
    failed_for_.erase(failed_for_.begin());
  failed_for_.emplace_back(encoder, std::chrono::steady_clock::now());
}

}  // namespace mlx_safe::metal
