// The ledger: which command buffers are in flight, what they signal and wait
// for, and what a failed one has spoilt.
//
// It holds rules only. It takes no lock, reads no clock, waits for nothing,
// sends no message and never calls out: threads and times are arguments, and
// objects are addresses. Its callers hold the lock of SharedLedger
// (shared_ledger.h), so all of it may run on any thread, Metal's included. None
// of it may run in the crash path: it allocates.
//
// Each call takes a look-up or two, or a pass over one event's entries. When a
// buffer completes, the first buffers in flight of all queues are looked at,
// and what they wait for, until no more of them settles.
// Bounded: the record of a buffer goes when the buffer has settled, that of an
// event when nothing is pending or failed on it. Both go when the object dies
// or its address is used again. The record of a queue stays until its address
// is another's or the process ends: MLX makes one for each stream and keeps it.
//
// The rules. docs/metal.md tells which fact of Metal or MLX forces each; R13 to
// R19 are kept by other units, which it names.
//
// R1  A value counts when its buffer has settled. Then the buffer's last
//     handler has run, all buffers before it on its queue have settled, and so
//     have those that signalled what it waited for.
// R2  A signal that is followed by a wait in its own buffer counts as soon as
//     the buffers before its own have settled.
// R3  A wait for a value depends on all pending signals up to that value. When
//     there is none, it depends on the lowest one beyond it that has come. It
//     never depends on later ones.
// R4  The withheld signals of a failed buffer are marked failed before they
//     can be seen.
// R5  A failure stays with its queue until it is raised: what settles there
//     meanwhile counts as failed.
// R6  What the queue had in flight when the failure was raised counts as failed
//     too. What is committed later does not.
// R7  A buffer that waits for a failed value fails its own queue.
// R8  Who raises a failure raises those, too, on which the failed buffer
//     depended.
// R9  A value that the CPU sets counts at once, unless a buffer in flight
//     signals that value or a lower one: then it counts with that buffer. A
//     value that the CPU sets from failed data is marked failed.
// R10 A value that is read is never one that an unsettled buffer has signalled.
//     Where a wait may raise, it is never a failed one either.
// R11 A value is never lowered under a higher one that is in flight.
// R12 When an object dies, or its address is used again, what is known of it is
//     forgotten; a buffer in flight is alive.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "objc/runtime.h"

namespace mlx_safe::metal {

using objc::Id;
using TimePoint = std::chrono::steady_clock::time_point;

// A fault, as the threads that depend on it raise it.
struct Failure {
  std::string message;
  objc::Owned error;  // the NSError; may be null
  std::atomic<bool> raised{false};
  // Failures on which what failed here depended (R8). Guarded by the lock.
  std::vector<std::weak_ptr<Failure>> came_before;

  Failure(std::string text, objc::Owned held)
      : message(std::move(text)), error(std::move(held)) {}
};
using FailureRef = std::shared_ptr<Failure>;

struct Signal {
  objc::Owned event;  // must outlive MLX's own handlers, which hold it too
  std::uint64_t value;
  std::size_t waits_before;  // so many of the buffer's waits come first
  // The event's value when the buffer had failed; until then: not known.
  std::uint64_t reached = ~std::uint64_t{0};
};

struct Wait {
  objc::Owned event;  // or its address might be another's when it is looked up
  std::uint64_t value;
};
using WaitRef = std::shared_ptr<const Wait>;

struct Queue;

struct Buffer {
  Id address;  // until it is completed; then it may be another's
  // MLX encodes a buffer and commits it on one thread.
  std::thread::id encoder;
  TimePoint opened;  // its first wait or signal
  std::shared_ptr<Queue> queue;
  std::uint64_t sequence = 0;  // on its queue, from 1, in order of commit
  std::vector<Signal> signals;
  std::vector<Wait> waits;
  FailureRef own;
  bool given_up = false;   // a wait was ended that its commit should have
  bool completed = false;  // its last handler has run
  bool settled = false;
};
using BufferRef = std::shared_ptr<Buffer>;

class Ledger {
 public:
  // Whether failures are tracked to what depends on them (intercept), or only
  // waits are held back (observe).
  void track_failures(bool on) noexcept { tracking_ = on; }

  // R12.
  void forget_buffer(Id buffer);
  void forget_queue(Id queue);
  void forget_event(Id event);

  // Which thread encodes, and when.
  struct Encoder {
    std::thread::id thread;
    TimePoint now;
  };
  void signal_encoded(Id buffer, objc::Owned event, std::uint64_t value,
                      const Encoder& by);
  void wait_encoded(Id buffer, objc::Owned event, std::uint64_t value,
                    const Encoder& by);
  // Right before the real commit, on the thread `by`.
  void committed(Id buffer, Id queue, std::thread::id by);
  // The record of a committed buffer that has not settled; null: there is none.
  BufferRef find(Id buffer) const;

  // In the last handler of `buffer`. Returns its record, null when it was
  // committed before there were hooks. With `own`, the buffer failed: the
  // caller is to do the signals that the GPU withheld (R4).
  BufferRef completed(Id buffer, FailureRef own);

  // Whether a wait for `value` that has come must be held back, `real` being
  // the value that the event shows (R1 to R3).
  bool is_closed(Id event, std::uint64_t value, std::uint64_t real) const;

  // Whether a buffer in flight signals `event` beyond `value` (R11).
  bool is_pending_beyond(Id event, std::uint64_t value) const;

  // What is to be read of `event` when it is `real` (R10): where a wait may not
  // raise, and where it may.
  std::uint64_t settled_value(Id event, std::uint64_t real) const;
  std::uint64_t visible(Id event, std::uint64_t real) const;

  // The failure on which `event` having reached `value` depends; null: none.
  FailureRef failure_of(Id event, std::uint64_t value) const;
  // The failure that stays with `queue` (R5); null: none.
  FailureRef unraised_on(Id queue) const;
  // A thread raises it: later work does not depend on it (R6, R8).
  void raised(const FailureRef& failure);

  // The CPU sets `event` to `value`; with `failure`, from failed data (R9).
  void signalled_by_cpu(Id event, std::uint64_t value,
                        const FailureRef& failure);

  // The hooks are taken out, so that objects may die and addresses be used
  // again unseen: what is in flight stays, all else is forgotten.
  void forget_failures();

  // Records: open buffers, those in flight, and those with all their handlers
  // run that have not settled.
  const std::unordered_map<Id, BufferRef>& buffers() const { return buffers_; }
  std::size_t event_count() const noexcept { return events_.size(); }

  // What was let go of since the last call. To be destroyed without the lock:
  // releasing an object may run code that comes back to the ledger.
  using Trash = std::vector<std::shared_ptr<void>>;
  Trash take_trash() noexcept { return std::exchange(trash_, {}); }
  std::size_t trash_size() const noexcept { return trash_.size(); }
  // One of it: the list keeps its memory.
  std::shared_ptr<void> take_last_trash() noexcept {
    std::shared_ptr<void> last = std::move(trash_.back());
    trash_.pop_back();
    return last;
  }

 private:
  friend struct LedgerInspector;  // tests/native: checks the invariants

  struct Pending {
    std::uint64_t value;
    BufferRef buffer;
    std::uint64_t need;  // sequence that its queue must have settled (R2)
  };
  struct Poison {
    std::uint64_t from, to;  // values that depend on the failure, inclusive
    FailureRef failure;
  };
  struct Event {
    std::uint64_t settled = 0;
    std::vector<Pending> pending;
    std::vector<Poison> poisons;
  };

  BufferRef& open(Id buffer, std::thread::id by, TimePoint now);
  void advance();
  bool advance(Queue& queue);
  bool may_settle(const Buffer& buffer) const;
  std::vector<const Pending*> keepers_of(const Buffer& buffer,
                                         const Wait& wait) const;
  // What a buffer depends on. is_found: `other` is there; is_open: one that has
  // not completed is.
  struct Search {
    const Buffer& other;
    bool guesses;  // those, too
    bool is_found = false, is_open = false;
    std::unordered_set<const Buffer*> seen{};
  };
  bool rests_on(const Buffer& buffer, const Buffer& other) const;
  void look(const Buffer& buffer, Search& search) const;
  void settle(const BufferRef& buffer);
  FailureRef inherited(const Buffer& buffer);
  void raise_on_queues(const FailureRef& failure);
  void mark_early(const Buffer& first);
  void mark(Id event, std::uint64_t from, std::uint64_t to,
            const FailureRef& failure);
  void drop_if_idle(Id event);
  const Event* find_event(Id event) const;
  static std::uint64_t settled_value(const Event& event, std::uint64_t real);
  static bool is_settled(const Pending& pending);
  static bool counts(const Event& event, const Pending& signal,
                     std::uint64_t real);

  bool tracking_ = false;
  std::unordered_map<Id, BufferRef> buffers_;
  std::unordered_map<Id, std::shared_ptr<Queue>> queues_;
  std::unordered_map<Id, Event> events_;
  // Queues that are gone but for buffers in flight.
  std::vector<std::shared_ptr<Queue>> leaving_;
  Trash trash_;
};

struct Queue {
  std::uint64_t committed = 0;
  std::uint64_t settled = 0;
  std::deque<BufferRef> in_flight;
  FailureRef unraised;  // R5
  // Buffers up to `tainted_until` count as failed because of `taint` (R6).
  FailureRef taint;
  std::uint64_t tainted_until = 0;
};

}  // namespace mlx_safe::metal
