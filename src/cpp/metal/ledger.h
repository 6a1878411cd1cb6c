// The ledger: which command buffers are in flight, what they signal and wait
// for, and what a failed one has spoilt.
//
// It knows no Objective-C but the addresses of objects, sends no messages while
// it holds its lock, and never calls out. Everything may be called on any
// thread, Metal's included, and nothing in the crash path: it locks and
// allocates. The lock is held for a look-up or two, or for a pass over one
// event's entries or the buffers that are encoded or in flight; when a buffer
// completes, while the queues' first buffers in flight, and what they wait for,
// are looked at until no more of them settles: that grows with the queues and
// with what is in flight, not with what has run; `held_up_by` alone takes as
// long as the square of that. Bounded: a buffer's record
// goes when it has settled, an event's when nothing is pending or failed
// on it, and both when the object dies or its address is used again. A queue's
// stays when the queue dies, until its address is another's or the process
// ends: MLX makes one for each stream and keeps it.
//
// Rules, and what forces them (MLX 0.31.2 and 0.32, see docs/metal.md):
// - An event is signalled by the GPU before the completion handlers of the
//   signalling buffer run, so a value counts only when that buffer has settled:
//   its handlers have run, and those of all buffers before it on its queue, and
//   those of the buffers that signalled what it waited for.
// - A signal that is followed by a wait in its own buffer counts as soon as the
//   buffers before its own have settled: the rest of the buffer may be waiting
//   for whoever waits for this signal.
// - A buffer committed mid-graph signals nothing, so a failure stays with its
//   queue until somebody has been told of it; whatever was in flight on the
//   queue at that moment counts as failed too.
// - A wait is held up by a signal that is encoded and not committed when it, or
//   a committed buffer that alone can end it, or one that is before or waited
//   for by such a buffer, waits for that signal (ledger_held_up.cpp).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "objc/runtime.h"

namespace mlx_safe::metal {

using objc::Id;

// A fault, as those who depend on it will be told.
struct Failure {
  std::string message;
  objc::Owned error;  // the NSError
  std::atomic<bool> told{false};
  // Failures that what failed here depended on anyway: who is told of this one
  // need not be told of them. Guarded by the ledger's lock.
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

struct Queue;

struct Buffer {
  Id address;  // until it is completed; then it may be another's
  // MLX encodes a buffer and commits it on one thread.
  std::thread::id encoder;
  std::chrono::steady_clock::time_point opened;  // its first wait or signal
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
  // Whether failures are tracked to those who depend on them (intercept), or
  // only waits are held back (observe).
  void track_failures(bool on) noexcept { tracking_ = on; }

  // An object with this address is new, or gone: whatever was known of an
  // earlier one at the same address is forgotten.
  void forget_buffer(Id buffer);
  void forget_queue(Id queue);
  void forget_event(Id event);

  void signal_encoded(Id buffer, Id event, std::uint64_t value);
  void wait_encoded(Id buffer, Id event, std::uint64_t value);
  // Right before the real commit.
  void committed(Id buffer, Id queue);
  // The record of a committed buffer that has not settled; null: there is none.
  BufferRef find(Id buffer);

  // In the last handler of `buffer`. Returns its record, null when it was
  // committed before there were hooks. With `own`, the buffer failed: its
  // signals are marked failed, and the caller is to do those that the GPU
  // withheld.
  BufferRef completed(Id buffer, FailureRef own);

  // Waits until what makes `event` reach `value` has settled, `real` being the
  // value that the event shows. False when that took longer than `limit`, of
  // which time in which this process did not run is no part.
  bool settle_event(Id event, std::uint64_t value, std::uint64_t real,
                    std::chrono::milliseconds limit);
  bool settle_buffer(const BufferRef& buffer, std::chrono::milliseconds limit);

  // Waits of failed buffers that the GPU left out, and whose values have not
  // come yet: the work that signals them is still going on.
  using WaitRef = std::shared_ptr<const Wait>;
  void wait_skipped(Id event, std::uint64_t value);
  std::vector<WaitRef> skipped_waits();
  void forget_skipped(const WaitRef& wait);
  // Whether this thread has encoded a signal and not committed it yet.
  bool is_encoding_here();
  // Of the signals that this thread has encoded and not committed: those that
  // a buffer in flight waits for.
  std::vector<WaitRef> awaited_from_here();
  // What committed buffers wait for: whoever asks for `held_up_by` looks first
  // how far these events have got, since no message is sent from here.
  std::vector<WaitRef> waits_in_flight();
  using Reached = std::unordered_map<Id, std::uint64_t>;
  struct HeldUp {
    std::vector<WaitRef> by;  // signals that are encoded and not committed
    // Of each of them: its buffer was opened longer than `age` ago, and what
    // its thread had committed before failed, at most `recent` before that.
    bool by_failure = false;
    bool given_up =
        false;  // of each of them: a wait for it was given up before
  };
  // A wait for these signals was ended as nobody seems to commit them.
  void give_up_on(const std::vector<WaitRef>& open_signals);
  // What keeps `event` from `value`: in `by` nothing when it may come by what
  // is committed, or by a CPU. An event that is not in `reached` has reached 0.
  HeldUp held_up_by(Id event, std::uint64_t value, const Reached& reached,
                    std::chrono::milliseconds age,
                    std::chrono::milliseconds recent);
  // Whether a buffer in flight signals `event` beyond `value`.
  bool is_pending_beyond(Id event, std::uint64_t value);

  // The value of `event` that may be shown when it is `real`: never one that
  // an unsettled buffer has signalled, and (`visible`) never a failed one.
  std::uint64_t settled_value(Id event, std::uint64_t real);
  std::uint64_t visible(Id event, std::uint64_t real);

  // The failure on which `event` having reached `value` depends; null: none.
  FailureRef failure_of(Id event, std::uint64_t value);
  // The failure on `queue` that nobody has been told of; null: none.
  FailureRef untold_on(Id queue);
  // Somebody raises it: later work is independent of it.
  void tell(const FailureRef& failure);

  // The CPU sets `event` to `value`; with `failure`, from failed data. A value
  // that a buffer in flight signals too counts when that buffer has settled.
  void signalled_by_cpu(Id event, std::uint64_t value,
                        const FailureRef& failure);

  // The hooks are taken out, so that objects may die and addresses be used
  // again unseen: what is in flight stays, all else is forgotten.
  void forget_failures();

  // Records held now: buffers, events.
  std::pair<std::size_t, std::size_t> sizes();
  // Only in a forked child, whose other threads are gone.
  void reset_after_fork() noexcept;

 private:
  struct Pending {
    std::uint64_t value;
    BufferRef buffer;
    std::uint64_t need;  // sequence that its queue must have settled
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
  // What is let go of while the lock is held is kept here until it is not:
  // releasing an object may run code that comes back to us.
  using Trash = std::vector<std::shared_ptr<void>>;

  BufferRef& open(Id buffer);
  bool is_awaited(Id event, std::uint64_t value);
  bool has_failed_around(const Buffer& open, std::chrono::milliseconds age,
                         std::chrono::milliseconds recent);
  void note_failure_of(std::thread::id encoder);
  void advance(Trash* trash);
  bool advance(Queue& queue, Trash* trash);
  bool may_settle(const Buffer& buffer);
  void settle(const BufferRef& buffer, Trash* trash);
  FailureRef inherited(const Buffer& buffer, Trash* trash);
  void tell_queues(const FailureRef& failure, Trash* trash);
  void mark(Id event, std::uint64_t from, std::uint64_t to,
            const FailureRef& failure, Trash* trash);
  void drop_if_idle(Id event);
  static std::uint64_t settled_value(const Event& event, std::uint64_t real);
  static bool is_settled(const Pending& pending);
  static bool is_closed(const Event& event, std::uint64_t value,
                        std::uint64_t real);
  FailureRef poison_of(Id event, std::uint64_t value);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> tracking_{false};
  std::atomic<std::size_t> event_count_{0};  // events_.size(), to look without
                                             // the lock
  std::unordered_map<Id, BufferRef> buffers_;
  std::unordered_map<Id, std::shared_ptr<Queue>> queues_;
  std::unordered_map<Id, Event> events_;
  // When a buffer that a thread had encoded failed last, for some threads.
  std::vector<std::pair<std::thread::id, std::chrono::steady_clock::time_point>>
      failed_for_;
  std::vector<WaitRef> skipped_;
  std::atomic<bool> any_skipped_{false};
  // Queues that are gone but for buffers in flight.
  std::vector<std::shared_ptr<Queue>> leaving_;
};

struct Queue {
  std::uint64_t committed = 0;
  std::uint64_t settled = 0;
  std::deque<BufferRef> in_flight;
  FailureRef untold;
  // Buffers up to `tainted_until` count as failed because of `taint`.
  FailureRef taint;
  std::uint64_t tainted_until = 0;
};

}  // namespace mlx_safe::metal
