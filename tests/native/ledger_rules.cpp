// Rules of the ledger, one by one, that ledger_model.cpp leaves out: addresses
// that are used again, several failures, and MLX's waiting for itself.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "ledger_inspector.h"
#include "metal/ledger.h"
#include "metal/self_waits.h"
#include "metal/skipped_waits.h"
#include "plain_objects.h"

namespace {

using namespace mlx_safe::metal;
using namespace std::chrono_literals;

Id id(int number) { return reinterpret_cast<Id>(std::uintptr_t(number)); }

const TimePoint kStart{1'000'000s};
// Threads are told apart only.
const std::thread::id kThisThread = std::this_thread::get_id();
const std::thread::id kOtherThread{};

FailureRef failure(const char* text = "f") {
  return std::make_shared<Failure>(text, mlx_safe::objc::Owned());
}

// A ledger, with numbers for objects: queues from 10, events from 20, buffers
// from 100.
struct Case {
  Ledger ledger;
  SelfWaits waits{ledger};

  Case() { ledger.track_failures(true); }
  ~Case() {
    LedgerInspector::check(ledger);
    LedgerInspector::dismantle(ledger);
  }

  Case& signals(int buffer, int event, std::uint64_t value,
                TimePoint now = kStart, std::thread::id by = kThisThread) {
    ledger.signal_encoded(id(buffer),
                          mlx_safe::objc::Owned::retaining(id(event)), value,
                          {by, now});
    return *this;
  }
  Case& waits_for(int buffer, int event, std::uint64_t value) {
    ledger.wait_encoded(id(buffer), mlx_safe::objc::Owned::retaining(id(event)),
                        value, {kThisThread, kStart});
    return *this;
  }
  Case& commit(int buffer, int queue) {
    ledger.committed(id(buffer), id(queue), kThisThread);
    LedgerInspector::check(ledger);
    return *this;
  }
  // As completion.cpp has it, with an event that shows `reached`.
  BufferRef complete(int buffer, FailureRef own = nullptr,
                     std::uint64_t reached = 0) {
    if (BufferRef record = ledger.find(id(buffer)); record && own)
      for (Signal& signal : record->signals) signal.reached = reached;
    BufferRef record = ledger.completed(id(buffer), std::move(own));
    LedgerInspector::check(ledger);
    return record;
  }
  FailureRef failure_of(int event, std::uint64_t value) const {
    return ledger.failure_of(id(event), value);
  }
  bool is_closed(int event, std::uint64_t value, std::uint64_t real) const {
    return ledger.is_closed(id(event), value, real);
  }
  std::size_t records() const { return ledger.buffers().size(); }
};

// ---- R1, R4: what the model asks of its own programs ------------------------

void unknown_objects() {
  Case c;
  CHECK(c.complete(100) == nullptr);
  CHECK(c.ledger.find(id(100)) == nullptr);
  CHECK(!c.is_closed(20, 1, 1) && c.failure_of(20, 1) == nullptr);
  CHECK(c.ledger.settled_value(id(20), 7) == 7);
  CHECK(c.ledger.visible(id(20), 7) == 7);
  CHECK(!c.ledger.is_pending_beyond(id(20), 0));
  CHECK(c.ledger.unraised_on(id(10)) == nullptr);
  // Encoded, not committed.
  c.signals(100, 20, 1);
  CHECK(c.ledger.find(id(100)) == nullptr && c.complete(100) == nullptr);
  CHECK(!c.is_closed(20, 1, 1) && !c.ledger.is_pending_beyond(id(20), 0));
}

// The values that a withheld signal passes over depend on the failure too; one
// that had come is not marked but for itself.
void marks_from_where_it_got() {
  Case c;
  c.signals(100, 20, 5).commit(100, 10);
  c.complete(100, failure(), 2);
  CHECK(c.failure_of(20, 2) == nullptr && c.failure_of(20, 6) == nullptr);
  for (std::uint64_t v = 3; v <= 5; ++v) CHECK(c.failure_of(20, v) != nullptr);
  CHECK(c.ledger.visible(id(20), 5) == 2 && c.ledger.visible(id(20), 2) == 2);
  CHECK(c.ledger.settled_value(id(20), 5) == 5);
  Case late;
  late.signals(100, 20, 5).commit(100, 10);
  late.complete(100, failure(), 5);
  CHECK(late.failure_of(20, 4) == nullptr && late.failure_of(20, 5) != nullptr);
}

// A failure is there for a value before the buffer has settled.
void marks_before_it_settles() {
  Case c;
  c.commit(100, 10).signals(101, 20, 1).commit(101, 10);
  FailureRef f = failure();
  BufferRef record = c.complete(101, f);
  CHECK(record && !record->settled && c.failure_of(20, 1) == f);
  CHECK(c.is_closed(20, 1, 1));
  c.complete(100);
  CHECK(record->settled && c.records() == 0);
}

void does_not_track() {
  Case c;
  c.ledger.track_failures(false);
  c.signals(100, 20, 1).commit(100, 10);
  CHECK(c.is_closed(20, 1, 1));
  c.complete(100, failure());
  CHECK(!c.is_closed(20, 1, 1) && c.failure_of(20, 1) == nullptr);
  CHECK(c.ledger.unraised_on(id(10)) == nullptr);
  CHECK(c.ledger.event_count() == 0);
}

// A later signal of its own queue does not hide another queue's.
void each_signal_on_the_way_counts() {
  Case c;
  c.waits_for(100, 20, 1).commit(100, 10).signals(101, 20, 5).commit(101, 10);
  c.signals(200, 20, 1).commit(200, 11);
  BufferRef record = c.complete(100);
  CHECK(!record->settled);
  c.complete(200);
  CHECK(record->settled);
}

// The lowest signal beyond the value has come, and may have brought it. Its
// handler has run, but not that of the buffer before it.
void a_guess_waits_for_what_is_before_it() {
  Case c;
  c.waits_for(100, 20, 1).commit(100, 10);
  c.commit(200, 11).signals(201, 20, 2).commit(201, 11);
  c.complete(201);
  BufferRef record = c.complete(100);
  CHECK(!record->settled);
  c.complete(200);
  CHECK(record->settled && c.records() == 0);
}

// Nor has that of the buffer that it waited for.
void a_guess_waits_for_what_it_waited_for() {
  Case c;
  c.waits_for(100, 20, 1).commit(100, 10).signals(300, 21, 1).commit(300, 12);
  c.waits_for(200, 21, 1).signals(200, 20, 2).commit(200, 11);
  c.complete(200);
  BufferRef record = c.complete(100);
  CHECK(!record->settled);
  c.complete(300);
  CHECK(record->settled && c.records() == 0);
}

// The guess waits for two buffers of one queue: what is known of the first,
// which waits for one that still runs, does not answer for the second.
void a_guess_looks_at_each_that_it_waited_for() {
  Case c;
  // The waiting buffer, for a value of which only a higher one is pending.
  c.waits_for(100, 20, 5).commit(100, 10);
  // Behind it on its queue, so it cannot settle before.
  c.signals(101, 21, 1).commit(101, 10);
  // Still runs.
  c.signals(102, 22, 1).commit(102, 11);
  c.waits_for(103, 22, 1).signals(103, 23, 1).commit(103, 12);
  c.waits_for(104, 21, 1).signals(104, 24, 1).commit(104, 12);
  c.waits_for(105, 23, 1).waits_for(105, 24, 1).signals(105, 20, 7);
  c.commit(105, 13);
  for (int buffer : {101, 103, 104, 105}) c.complete(buffer);
  BufferRef record = c.complete(100);
  CHECK(record && record->settled);
  c.complete(102);
  CHECK(c.records() == 0);
}

// Two streams wait for each other's values, of which only higher ones are
// pending: one guess is wrong, and nobody knows which. One that has not
// completed may be before the right one.
void of_guesses_none_is_dropped_while_one_is_open() {
  Case c;
  c.waits_for(100, 21, 1).commit(100, 10);
  c.waits_for(101, 21, 1).commit(101, 10);
  c.signals(102, 20, 2).commit(102, 10);
  c.signals(200, 21, 1).waits_for(200, 20, 1).commit(200, 11);
  c.complete(200);
  c.complete(102);
  c.waits_for(201, 20, 1).signals(201, 21, 2).commit(201, 11);
  BufferRef record = c.complete(201);
  c.complete(100);
  CHECK(!record->settled);
  c.complete(101);
  CHECK(record->settled && c.records() == 0);
}

// Failed values beyond the limit are merged, and none gets lost.
void many_failed_values() {
  Case c;
  for (std::uint64_t v = 1; v <= 300; ++v) {
    FailureRef f = failure();
    c.signals(100, 20, 10 * v).commit(100, 10);
    c.complete(100, f, 10 * v - 1);
    c.ledger.raised(f);
    CHECK(c.ledger.visible(id(20), 10 * v) == 9);
  }
  for (std::uint64_t v = 1; v <= 300; ++v)
    CHECK(c.failure_of(20, 10 * v) != nullptr);
  CHECK(c.failure_of(20, 9) == nullptr && c.failure_of(20, 3001) == nullptr);
  // Not merged: the last 63.
  CHECK(c.failure_of(20, 2995) == nullptr && c.failure_of(20, 2385) == nullptr);
  CHECK(c.failure_of(20, 2365) != nullptr);
}

// Nor when they come in another order.
void many_failed_values_downwards() {
  Case c;
  for (std::uint64_t v = 300; v >= 1; --v)
    c.ledger.signalled_by_cpu(id(20), 10 * v, failure());
  for (std::uint64_t v = 1; v <= 300; ++v)
    CHECK(c.failure_of(20, 10 * v) != nullptr);
}

// R2 and R3: a later value that has come is not asked for, where there is one
// up to the value that counts.
void a_later_value_is_not_asked_for() {
  Case c;
  c.signals(100, 20, 1).waits_for(100, 21, 1).commit(100, 10);
  c.signals(101, 20, 2).commit(101, 11);
  CHECK(!c.is_closed(20, 1, 2) && c.is_closed(20, 2, 2));
  // Nor by a buffer that waits: it settles, though the later value's has not.
  Case other;
  other.signals(100, 20, 1).waits_for(100, 21, 1).commit(100, 10);
  other.commit(101, 11).signals(102, 20, 2).commit(102, 11);
  other.waits_for(103, 20, 1).signals(103, 22, 1).commit(103, 12);
  other.complete(102);
  other.complete(103);
  CHECK(!other.is_closed(22, 1, 1));
}

// ---- R5 to R8: several failures
// ----------------------------------------------

void the_second_stands_for_the_first() {
  Case c;  // on one queue
  FailureRef first = failure("first"), second = failure("second");
  c.commit(100, 10).signals(101, 20, 1).commit(101, 10);
  c.complete(100, first);
  CHECK(c.ledger.unraised_on(id(10)) == first);
  c.complete(101, second);
  CHECK(c.failure_of(20, 1) == second);
  CHECK(c.ledger.unraised_on(id(10)) == second);
  c.ledger.raised(second);
  CHECK(first->raised && second->raised);
  CHECK(c.ledger.unraised_on(id(10)) == nullptr);
  c.signals(102, 20, 2).commit(102, 10);
  c.complete(102);
  CHECK(c.failure_of(20, 2) == nullptr);
}

void over_two_queues() {
  Case c;
  FailureRef a = failure("a"), b = failure("b"), d = failure("d");
  // b waits for a's event, d for b's: who raises d raises all three.
  c.signals(100, 20, 1).commit(100, 10);
  c.waits_for(101, 20, 1).signals(101, 21, 1).commit(101, 11);
  c.waits_for(102, 21, 1).signals(102, 22, 1).commit(102, 12);
  c.complete(100, a);
  c.complete(101, b);
  c.complete(102, d);
  CHECK(c.ledger.unraised_on(id(10)) == a && c.failure_of(22, 1) == d);
  c.ledger.raised(d);
  CHECK(a->raised && b->raised && d->raised);
  for (int q = 10; q <= 12; ++q) CHECK(c.ledger.unraised_on(id(q)) == nullptr);
  // One that came after is another's.
  FailureRef late = failure("late");
  c.commit(103, 10);
  c.complete(103, late);
  c.ledger.raised(d);
  CHECK(!late->raised && c.ledger.unraised_on(id(10)) == late);
}

void the_list_of_earlier_ones_is_bounded() {
  Case c;
  std::vector<FailureRef> all;
  for (int i = 0; i < 100; ++i) {
    all.push_back(failure());
    c.commit(100, 10);
    c.complete(100, all.back());
    CHECK(all.back()->came_before.size() <= 32);
  }
  CHECK(all[40]->came_before.size() == 32);
  c.ledger.raised(all.back());
  std::size_t raised = 0;
  for (const FailureRef& one : all) raised += one->raised ? 1 : 0;
  CHECK(raised == 33);
  CHECK(c.ledger.unraised_on(id(10)) == nullptr);
}

// A failure that is gone is not kept alive by those that stand for it.
void earlier_ones_may_go() {
  Case c;
  FailureRef second = failure("second");
  c.commit(100, 10);
  c.complete(100, failure("first"));
  c.commit(101, 10);
  c.complete(101, second);
  (void)c.ledger.take_trash();
  CHECK(second->came_before.size() == 1 && second->came_before[0].expired());
  FailureRef third = failure("third");
  c.commit(102, 10);
  c.complete(102, third);
  CHECK(third->came_before.size() == 1);  // the second alone
  c.ledger.raised(third);
  CHECK(second->raised);
}

// It was raised before the queue that waits for it had settled: what this one
// has in flight counts as failed, what is committed later does not.
void it_comes_late_to_another_queue() {
  Case c;
  FailureRef f = failure();
  c.signals(100, 20, 1).commit(100, 10);
  c.waits_for(101, 20, 1).commit(101, 11).signals(102, 21, 1).commit(102, 11);
  c.complete(100, f);
  c.ledger.raised(f);
  c.complete(101);
  CHECK(c.ledger.unraised_on(id(11)) == nullptr);
  c.signals(103, 21, 2).commit(103, 11);
  c.complete(102);
  c.complete(103);
  CHECK(c.failure_of(21, 1) == f && c.failure_of(21, 2) == nullptr);
}

// What counts early, on a queue with a failure that was raised and another one.
void the_newer_one_is_marked_early() {
  Case c;
  FailureRef a = failure("a"), b = failure("b");
  c.commit(100, 10).commit(101, 10);
  c.signals(102, 20, 1).waits_for(102, 21, 1).commit(102, 10);
  c.complete(100, a);
  c.ledger.raised(a);
  c.complete(101, b);
  CHECK(c.failure_of(20, 1) == b);
}

// One of the earlier failures is gone; those after it are raised.
void one_that_is_gone_ends_no_list() {
  Case c;
  FailureRef earlier = failure(), later = failure();
  c.commit(100, 10);
  c.complete(100, earlier);
  later->came_before.push_back(failure());
  later->came_before.push_back(earlier);
  c.ledger.raised(later);
  CHECK(earlier->raised && c.ledger.unraised_on(id(10)) == nullptr);
}

// Its own failure is what a buffer tells of, and what stays.
void its_own_comes_first() {
  Case c;
  FailureRef a = failure("a"), b = failure("b");
  c.signals(100, 20, 1).commit(100, 10);
  c.complete(100, a);
  c.waits_for(101, 20, 1).signals(101, 21, 1).commit(101, 11);
  c.complete(101, b);
  CHECK(c.failure_of(21, 1) == b && c.ledger.unraised_on(id(11)) == b);
}

// ---- R9
// -----------------------------------------------------------------------

void a_cpu_signals() {
  Case c;
  FailureRef f = failure();
  c.ledger.signalled_by_cpu(id(20), 3, f);
  CHECK(c.failure_of(20, 3) == f && c.failure_of(20, 2) == nullptr);
  CHECK(c.failure_of(20, 4) == nullptr && c.ledger.visible(id(20), 5) == 2);
  // A buffer signals 2 and is not through: 2 and more count with it.
  c.signals(100, 21, 2).commit(100, 10);
  c.ledger.signalled_by_cpu(id(21), 2, nullptr);
  CHECK(c.is_closed(21, 2, 2));
  c.ledger.signalled_by_cpu(id(21), 5, nullptr);
  CHECK(c.is_closed(21, 5, 5));
  // 1 is the CPU's own.
  CHECK(c.is_closed(21, 1, 2));
  c.ledger.signalled_by_cpu(id(21), 1, nullptr);
  CHECK(!c.is_closed(21, 1, 2) && c.is_closed(21, 2, 2));
  c.complete(100);
  CHECK(!c.is_closed(21, 5, 5));
}

// It sets what lies between the values of two buffers.
void a_cpu_signals_between_buffers() {
  Case c;
  c.signals(100, 20, 2).commit(100, 10).signals(101, 20, 9).commit(101, 10);
  c.ledger.signalled_by_cpu(id(20), 5, nullptr);
  CHECK(c.is_closed(20, 2, 5));
}

// A value that the CPU has set is read, though a buffer sets it once more.
void a_value_that_a_cpu_has_set() {
  Case c;
  c.signals(100, 20, 9).commit(100, 10);
  c.ledger.signalled_by_cpu(id(20), 5, nullptr);
  c.signals(101, 20, 5).commit(101, 11);
  CHECK(c.ledger.settled_value(id(20), 5) == 5);
}

// ---- R12
// ------------------------------------------------------------------------

void buffers_addresses() {
  Case c;
  c.signals(100, 20, 1);
  c.ledger.forget_buffer(id(100));  // never committed
  c.commit(100, 10);
  CHECK(c.ledger.find(id(100))->signals.empty());
  c.ledger.forget_buffer(id(100));  // in flight
  CHECK(c.ledger.find(id(100)) != nullptr);
  // Completed, but the one before it has not settled.
  c.signals(101, 20, 1).commit(101, 10);
  c.complete(101);
  c.ledger.forget_buffer(id(101));
  CHECK(c.ledger.find(id(101)) == nullptr && c.is_closed(20, 1, 1));
  // The next one has its address.
  c.signals(101, 20, 2).commit(101, 10);
  CHECK(c.ledger.find(id(101))->sequence == 3);
  c.complete(100);
  CHECK(!c.is_closed(20, 1, 1) && c.is_closed(20, 2, 2));
  CHECK(c.ledger.find(id(101)) != nullptr);
  c.complete(101);
  CHECK(!c.is_closed(20, 2, 2) && c.records() == 0);
  c.ledger.forget_buffer(id(101));
  c.ledger.forget_buffer(id(999));
}

// Without having been told that the old one is gone.
void an_address_is_used_again_unseen() {
  Case c;
  c.commit(100, 10).signals(101, 20, 1).commit(101, 10);
  c.complete(101);
  c.waits_for(101, 20, 1).signals(101, 20, 2);
  CHECK(c.ledger.find(id(101)) == nullptr);
  c.commit(101, 10);
  BufferRef again = c.ledger.find(id(101));
  CHECK(again && again->signals.size() == 1 && again->waits.size() == 1);
  c.complete(100);
  CHECK(c.ledger.find(id(101)) == again);
}

void queues_addresses() {
  Case c;
  FailureRef f = failure();
  c.commit(100, 10);
  c.complete(100, f);
  CHECK(c.ledger.unraised_on(id(10)) == f);
  c.ledger.forget_queue(id(10));
  c.ledger.forget_queue(id(10));
  CHECK(c.ledger.unraised_on(id(10)) == nullptr);
  // One that has buffers in flight: they go on, beside those of its successor.
  c.signals(101, 20, 1).commit(101, 10);
  c.ledger.forget_queue(id(10));
  c.signals(102, 21, 1).commit(102, 10);
  CHECK(c.ledger.find(id(102))->sequence == 1);
  CHECK(c.is_closed(20, 1, 1) && c.is_closed(21, 1, 1));
  c.complete(102);
  CHECK(c.is_closed(20, 1, 1) && !c.is_closed(21, 1, 1));
  c.complete(101);
  CHECK(!c.is_closed(20, 1, 1) && c.records() == 0);
}

void a_queue_that_has_died_lets_others_settle() {
  Case c;
  c.signals(100, 20, 1).commit(100, 10);
  c.ledger.forget_queue(id(10));
  c.waits_for(101, 20, 1).signals(101, 21, 1).commit(101, 11);
  c.complete(101);
  CHECK(c.is_closed(21, 1, 1));
  c.complete(100);
  CHECK(!c.is_closed(21, 1, 1) && c.records() == 0);
}

// A later value of the same event is not waited for, though it has come.
void a_value_that_has_settled_stays_so() {
  Case c;
  c.signals(100, 20, 1).commit(100, 10).commit(101, 10);
  c.signals(102, 20, 2).commit(102, 10);
  c.waits_for(103, 20, 1).signals(103, 21, 1).commit(103, 11);
  for (int buffer : {100, 102, 103}) c.complete(buffer);
  CHECK(!c.is_closed(20, 1, 2) && !c.is_closed(21, 1, 1));
}

void events_addresses() {
  Case c;
  FailureRef f = failure();
  c.signals(100, 20, 1).commit(100, 10);
  c.complete(100, f);
  c.ledger.forget_event(id(20));
  c.ledger.forget_event(id(20));
  CHECK(c.failure_of(20, 1) == nullptr && c.ledger.event_count() == 0);
}

void all_is_forgotten() {
  Case c;
  FailureRef f = failure();
  c.signals(100, 20, 1).commit(100, 10);
  c.signals(101, 20, 2).commit(101, 10);
  c.complete(100, f);
  c.signals(102, 21, 1);  // open
  c.ledger.signalled_by_cpu(id(22), 1, f);
  c.ledger.raised(f);
  c.ledger.forget_failures();
  CHECK(c.failure_of(20, 1) == nullptr && c.failure_of(22, 1) == nullptr);
  CHECK(c.ledger.event_count() == 1 && c.records() == 1);
  CHECK(c.is_closed(20, 2, 2));
  c.complete(101);  // no longer tainted
  CHECK(c.failure_of(20, 2) == nullptr && c.ledger.event_count() == 0);
  Case other;  // nor what was not raised
  other.commit(100, 10).signals(101, 20, 1).commit(101, 10);
  other.complete(100, failure());
  other.ledger.forget_failures();
  other.complete(101);
  CHECK(other.failure_of(20, 1) == nullptr);
}

// Every reference is let go of, and not before `take_trash`.
// What is in flight is kept, whatever is encoded beside it.
void what_is_open_is_forgotten() {
  Case c;
  for (int i = 0; i < 10; ++i)
    c.signals(100 + i, 20, 1).signals(200 + i, 20, 1).commit(200 + i, 10);
  c.ledger.forget_failures();
  CHECK(c.records() == 10);
}

// A failure that was raised is forgotten with what it had spoilt, so the next
// one is seen.
void one_after_all_is_forgotten() {
  Case c;
  FailureRef a = failure("a"), b = failure("b");
  c.commit(100, 10).waits_for(101, 20, 1).commit(101, 10);
  c.complete(100, a);
  c.ledger.raised(a);
  c.ledger.forget_failures();
  c.signals(200, 20, 1).commit(200, 11);
  c.complete(200, b);
  c.complete(101);
  CHECK(c.ledger.unraised_on(id(10)) == b);
}

void references_are_let_go_of() {
  long before = plain_objects::references;
  {
    Case c;
    c.signals(100, 20, 1).waits_for(100, 21, 1).commit(100, 10);
    CHECK(plain_objects::references == before + 2);
    c.complete(100);
    CHECK(plain_objects::references == before + 2);
    (void)c.ledger.take_trash();
    CHECK(plain_objects::references == before);
    c.signals(101, 20, 1);
    c.ledger.forget_buffer(id(101));
    CHECK(plain_objects::references == before + 1);
    (void)c.ledger.take_trash();
    CHECK(plain_objects::references == before);
    c.signals(102, 20, 1);
    c.ledger.forget_failures();
    CHECK(plain_objects::references == before + 1);
    (void)c.ledger.take_trash();
    CHECK(plain_objects::references == before);
  }
  CHECK(plain_objects::references == before);
}

// Failures, too: the object that one holds is released then.
void failures_are_let_go_of() {
  Case c;
  FailureRef f = failure();
  std::weak_ptr<Failure> of_event = f;
  c.ledger.signalled_by_cpu(id(20), 1, std::exchange(f, nullptr));
  c.ledger.forget_event(id(20));
  CHECK(!of_event.expired());
  (void)c.ledger.take_trash();
  CHECK(of_event.expired());
  // Of values that are merged with others.
  std::vector<std::weak_ptr<Failure>> merged;
  for (std::uint64_t v = 1; v <= 100; ++v) {
    FailureRef one = failure();
    merged.push_back(one);
    c.ledger.signalled_by_cpu(id(21), 10 * v, std::move(one));
  }
  for (const auto& one : merged) CHECK(!one.expired());
  (void)c.ledger.take_trash();
  CHECK(merged[1].expired());
  // Of a queue that dies before its last buffer has settled.
  f = failure();
  std::weak_ptr<Failure> of_queue = f;
  c.commit(100, 10).commit(101, 10);
  c.complete(100, std::exchange(f, nullptr));
  c.ledger.forget_queue(id(10));
  (void)c.ledger.take_trash();
  c.complete(101);
  CHECK(!of_queue.expired());
  (void)c.ledger.take_trash();
  CHECK(of_queue.expired());
  // Of a queue that dies with nothing in flight.
  f = failure();
  std::weak_ptr<Failure> of_idle = f;
  c.commit(103, 12);
  c.complete(103, std::exchange(f, nullptr));
  (void)c.ledger.take_trash();
  c.ledger.forget_queue(id(12));
  CHECK(!of_idle.expired());
  (void)c.ledger.take_trash();
  CHECK(of_idle.expired());
  // Of one that was raised, after the next one.
  f = failure();
  std::weak_ptr<Failure> earlier = f;
  c.commit(104, 13);
  c.complete(104, f);
  c.ledger.raised(std::exchange(f, nullptr));
  c.commit(105, 13);
  f = failure();
  c.complete(105, f);
  (void)c.ledger.take_trash();
  c.ledger.raised(f);
  CHECK(!earlier.expired());
  (void)c.ledger.take_trash();
  CHECK(earlier.expired());
  // Of one that was raised and is forgotten.
  f = failure();
  std::weak_ptr<Failure> raised = f;
  c.commit(102, 11);
  c.complete(102, f);
  c.ledger.raised(std::exchange(f, nullptr));
  (void)c.ledger.take_trash();
  c.ledger.forget_failures();
  CHECK(!raised.expired());
  (void)c.ledger.take_trash();
  CHECK(raised.expired());
}

// ---- R13
// ----------------------------------------------------------------------

void skipped() {
  SkippedWaits waits;
  CHECK(waits.all().empty());
  waits.add(id(20), 1);
  waits.add(id(21), 2);
  std::vector<WaitRef> all = waits.all();
  CHECK(all.size() == 2 && all[0]->event.get() == id(20) && all[1]->value == 2);
  waits.forget(all[0]);
  CHECK(waits.all().size() == 1 && waits.all()[0] == all[1]);
  waits.forget(all[0]);
  waits.forget(all[1]);
  CHECK(waits.all().empty());
  waits.add(id(20), 1);
  waits.forget_all();
  CHECK(waits.all().empty());
  waits.add(id(21), 2);
  CHECK(waits.all().size() == 1);
}

// ---- R14 to R17
// -----------------------------------------------------------------

void one_of_several_waits() {
  Case c;
  c.signals(100, 20, 1);
  c.waits_for(101, 21, 5).waits_for(101, 20, 1).commit(101, 10);
  CHECK(c.waits.awaited_from(kThisThread).size() == 1);
}

void open_signals_of_a_thread() {
  Case c;
  CHECK(!c.waits.is_encoding(kThisThread));
  c.waits_for(100, 20, 1);
  CHECK(!c.waits.is_encoding(kThisThread));  // it signals nothing
  c.signals(100, 21, 3);
  CHECK(c.waits.is_encoding(kThisThread));
  CHECK(!c.waits.is_encoding(kOtherThread));
  CHECK(c.waits.awaited_from(kThisThread).empty());
  c.waits_for(101, 21, 4).commit(101, 11);  // beyond it
  CHECK(c.waits.awaited_from(kThisThread).empty());
  c.waits_for(102, 21, 3);  // not in flight
  CHECK(c.waits.awaited_from(kThisThread).empty());
  c.commit(102, 11);
  std::vector<WaitRef> found = c.waits.awaited_from(kThisThread);
  CHECK(found.size() == 1 && found[0]->event.get() == id(21));
  CHECK(found[0]->value == 3 && c.waits.awaited_from(kOtherThread).empty());
  CHECK(c.waits.waits_in_flight().size() == 2);
  c.commit(100, 10);
  CHECK(!c.waits.is_encoding(kThisThread));
  CHECK(c.waits.awaited_from(kThisThread).empty());
  CHECK(c.waits.waits_in_flight().size() == 3);
  c.complete(102);  // not settled, and not in flight any more
  CHECK(c.waits.waits_in_flight().size() == 2);
}

SelfWaits::HeldUp held(const Case& c, int event, std::uint64_t value,
                       TimePoint now, const SelfWaits::Reached& reached = {}) {
  return c.waits.held_up_by(id(event), value, reached, {now, 1s, 100ms});
}

// R16: what the thread had committed failed 100 ms before it encoded at most,
// and both are over for a second.
void ended_by_the_failure() {
  Case c;
  c.signals(100, 20, 1, kStart + 5s);
  CHECK(held(c, 20, 1, kStart + 60s).by.size() == 1);
  CHECK(!held(c, 20, 1, kStart + 60s).by_failure);
  CHECK(held(c, 20, 1, kStart, {{id(20), 1}}).by.empty());
  c.waits.note_failure(kOtherThread, kStart + 5s);
  CHECK(!held(c, 20, 1, kStart + 60s).by_failure);
  c.waits.note_failure(kThisThread, kStart + 5s - 101ms);
  CHECK(!held(c, 20, 1, kStart + 60s).by_failure);
  c.waits.note_failure(kThisThread, kStart + 5s - 100ms);
  CHECK(held(c, 20, 1, kStart + 60s).by_failure);
  CHECK(held(c, 20, 1, kStart + 6s).by_failure);
  CHECK(!held(c, 20, 1, kStart + 6s - 1ms).by_failure);  // opened too late
  c.waits.note_failure(kThisThread, kStart + 7s);        // it forgets the first
  CHECK(held(c, 20, 1, kStart + 8s).by_failure);
  CHECK(!held(c, 20, 1, kStart + 8s - 1ms).by_failure);
  CHECK(!held(c, 20, 2, kStart + 60s).by_failure);  // nothing holds it up
  // All that hold it up must be.
  c.signals(101, 20, 1, kStart + 20s);
  CHECK(!held(c, 20, 1, kStart + 60s).by_failure);
}

void failures_of_few_threads_are_kept() {
  Case c;
  c.signals(100, 20, 1, kStart, kThisThread);
  c.waits.note_failure(kThisThread, kStart);
  std::vector<std::thread::id> others;
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 16; ++i) threads.emplace_back([] {});
    for (std::jthread& one : threads) others.push_back(one.get_id());
  }
  for (int i = 0; i < 15; ++i) c.waits.note_failure(others[i], kStart);
  CHECK(held(c, 20, 1, kStart + 9s).by_failure);
  c.waits.note_failure(others[0], kStart);  // known: none goes
  CHECK(held(c, 20, 1, kStart + 9s).by_failure);
  c.waits.note_failure(others[15], kStart);
  CHECK(!held(c, 20, 1, kStart + 9s).by_failure);
}

void given_up() {
  Case c;
  c.signals(100, 20, 2).signals(101, 20, 2);
  SelfWaits::HeldUp found = held(c, 20, 1, kStart);
  CHECK(found.by.size() == 2 && !found.given_up);
  CHECK(found.by[0]->value == 1);
  c.waits.give_up_on({found.by[0]});
  CHECK(held(c, 20, 1, kStart).given_up);
  c.signals(102, 20, 2);
  CHECK(!held(c, 20, 1, kStart).given_up);
  // However many are in flight.
  Case busy;
  for (int i = 0; i < 50; ++i) busy.commit(200 + i, 10);
  busy.signals(100, 20, 2);
  busy.waits.give_up_on(held(busy, 20, 1, kStart).by);
  CHECK(held(busy, 20, 1, kStart).given_up);
  // Of lower signals it says nothing.
  Case other;
  other.signals(100, 20, 2).signals(101, 20, 3).signals(102, 21, 3);
  other.waits.give_up_on(held(other, 20, 3, kStart).by);
  CHECK(held(other, 20, 3, kStart).given_up);
  CHECK(!held(other, 20, 2, kStart).given_up);
  CHECK(!held(other, 21, 3, kStart).given_up);
}

// Every value that is awaited, and none of another queue's.
void all_that_holds_up_is_told() {
  Case events;
  events.signals(100, 21, 1).signals(100, 22, 1);
  events.waits_for(101, 21, 1).waits_for(101, 22, 1).signals(101, 20, 1);
  events.commit(101, 10);
  CHECK(held(events, 20, 1, kStart).by.size() == 2);
  Case values;
  values.signals(100, 21, 2);
  values.waits_for(101, 21, 1).waits_for(101, 21, 2).signals(101, 20, 1);
  values.commit(101, 10);
  CHECK(held(values, 20, 1, kStart).by.size() == 2);
  Case queues;
  queues.signals(100, 21, 1).signals(103, 22, 1);
  queues.waits_for(110, 22, 1).commit(110, 11);
  queues.waits_for(101, 21, 1).signals(101, 20, 1).commit(101, 10);
  CHECK(held(queues, 20, 1, kStart).by.size() == 1);
}

// R15 against its own words, in programs by chance with a seed that is fixed.
class HeldUpModel {
 public:
  explicit HeldUpModel(std::uint32_t seed) : random_(seed) {
    int buffers = 2 + pick(4);
    for (int b = 0; b < buffers; ++b) add(b);
    for (const Buffer& b : buffers_)
      if (b.queue != 0) case_.commit(b.id, b.queue);
    run();
  }

  void check() {
    for (int e = 0; e < kEvents; ++e)
      for (std::uint64_t v = 1; v <= 3; ++v) check(e, v);
  }

 private:
  static constexpr int kEvents = 3;
  struct Op {
    bool waits;
    int event;
    std::uint64_t value;
  };
  struct Buffer {
    int id, queue;  // 0: open
    std::vector<Op> ops;
    std::size_t at = 0;
  };

  int pick(int count) { return static_cast<int>(random_() % unsigned(count)); }

  void add(int b) {
    Buffer buffer{100 + b, pick(3) == 0 ? 0 : 10 + pick(2), {}, 0};
    for (int i = 1 + pick(3); i > 0; --i) {
      Op op{pick(2) == 0, pick(kEvents), 1 + std::uint64_t(pick(3))};
      buffer.ops.push_back(op);
      if (op.waits)
        case_.waits_for(buffer.id, 20 + op.event, op.value);
      else
        case_.signals(buffer.id, 20 + op.event, op.value);
    }
    buffers_.push_back(std::move(buffer));
  }

  // The GPU goes as far as it can; what is through completes.
  void run() {
    for (bool again = true; again;) {
      again = false;
      for (std::size_t i = 0; i < buffers_.size(); ++i) {
        Buffer& b = buffers_[i];
        if (b.queue == 0 || is_through(b) || !is_first(i)) continue;
        const Op& op = b.ops[b.at];
        if (op.waits && real_[op.event] < op.value) continue;
        if (!op.waits) real_[op.event] = std::max(real_[op.event], op.value);
        if (++b.at == b.ops.size()) case_.complete(b.id);
        again = true;
      }
    }
  }
  static bool is_through(const Buffer& b) { return b.at == b.ops.size(); }
  bool is_first(std::size_t i) const {
    for (std::size_t k = 0; k < i; ++k)
      if (buffers_[k].queue == buffers_[i].queue && !is_through(buffers_[k]))
        return false;
    return true;
  }

  // Signals that keep the wait from its value, by the words of the rule: all
  // that would bring it are open, or behind a wait that is held up.
  bool is_held(int event, std::uint64_t value, std::vector<Op> on_the_way) {
    if (real_[event] >= value) return false;
    for (const Op& op : on_the_way)
      if (op.event == event && op.value == value) return false;
    on_the_way.push_back({true, event, value});
    bool found = false;
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      const Buffer& b = buffers_[i];
      if (is_through(b)) continue;
      for (std::size_t k = 0; k < b.ops.size(); ++k) {
        const Op& op = b.ops[k];
        if (op.waits || op.event != event || op.value < value) continue;
        found = true;
        if (b.queue != 0 && !is_behind_held(i, k, on_the_way)) return false;
      }
    }
    return found;
  }
  bool is_behind_held(std::size_t at, std::size_t op,
                      const std::vector<Op>& on_the_way) {
    for (std::size_t i = 0; i <= at; ++i) {
      const Buffer& b = buffers_[i];
      if (b.queue != buffers_[at].queue || is_through(b)) continue;
      std::size_t end = i == at ? op : b.ops.size();
      for (std::size_t k = 0; k < end; ++k)
        if (b.ops[k].waits &&
            is_held(b.ops[k].event, b.ops[k].value, on_the_way))
          return true;
    }
    return false;
  }

  SelfWaits::HeldUp ask(int event, std::uint64_t value) {
    SelfWaits::Reached reached;
    for (int e = 0; e < kEvents; ++e) reached[id(20 + e)] = real_[e];
    return held(case_, 20 + event, value, kStart, reached);
  }

  void check(int event, std::uint64_t value) {
    SelfWaits::HeldUp found = ask(event, value);
    CHECK(found.by.empty() == !is_held(event, value, {}));
    if (found.by.empty()) return;
    for (const WaitRef& wait : found.by) CHECK(is_open(*wait));
    // Done, they hold it up no longer; others may, that were behind them.
    HeldUpModel after = *this;
    for (int rounds = 0; !found.by.empty(); ++rounds) {
      CHECK(rounds < 10);
      for (const WaitRef& wait : found.by)
        after.real_[event_of(*wait)] =
            std::max(after.real_[event_of(*wait)], wait->value);
      after.run();
      found = after.ask(event, value);
    }
    CHECK(!after.is_held(event, value, {}));
  }
  static int event_of(const Wait& wait) {
    return static_cast<int>(
               reinterpret_cast<std::uintptr_t>(wait.event.get())) -
           20;
  }
  bool is_open(const Wait& wait) const {
    for (const Buffer& b : buffers_)
      for (const Op& op : b.ops)
        if (b.queue == 0 && !op.waits && op.event == event_of(wait) &&
            op.value >= wait.value)
          return true;
    return false;
  }

  // The same again.
  HeldUpModel(const HeldUpModel& other) : buffers_(other.buffers_) {
    for (Buffer& b : buffers_) {
      b.at = 0;
      for (const Op& op : b.ops)
        if (op.waits)
          case_.waits_for(b.id, 20 + op.event, op.value);
        else
          case_.signals(b.id, 20 + op.event, op.value);
    }
    for (const Buffer& b : buffers_)
      if (b.queue != 0) case_.commit(b.id, b.queue);
    for (int e = 0; e < kEvents; ++e) real_[e] = 0;
    run();
  }

  std::mt19937 random_;
  Case case_;
  std::vector<Buffer> buffers_;
  std::uint64_t real_[kEvents] = {};
};

void held_up() {
  for (std::uint32_t seed = 1; seed <= 20'000; ++seed)
    HeldUpModel(seed).check();
}

}  // namespace

int main() {
  unknown_objects();
  marks_from_where_it_got();
  marks_before_it_settles();
  does_not_track();
  each_signal_on_the_way_counts();
  a_guess_waits_for_what_is_before_it();
  a_guess_waits_for_what_it_waited_for();
  a_guess_looks_at_each_that_it_waited_for();
  of_guesses_none_is_dropped_while_one_is_open();
  many_failed_values();
  many_failed_values_downwards();
  a_later_value_is_not_asked_for();
  the_second_stands_for_the_first();
  over_two_queues();
  the_list_of_earlier_ones_is_bounded();
  earlier_ones_may_go();
  it_comes_late_to_another_queue();
  the_newer_one_is_marked_early();
  one_that_is_gone_ends_no_list();
  its_own_comes_first();
  a_cpu_signals();
  a_cpu_signals_between_buffers();
  a_value_that_a_cpu_has_set();
  buffers_addresses();
  an_address_is_used_again_unseen();
  queues_addresses();
  a_queue_that_has_died_lets_others_settle();
  a_value_that_has_settled_stays_so();
  events_addresses();
  all_is_forgotten();
  what_is_open_is_forgotten();
  one_after_all_is_forgotten();
  references_are_let_go_of();
  failures_are_let_go_of();
  skipped();
  open_signals_of_a_thread();
  one_of_several_waits();
  ended_by_the_failure();
  failures_of_few_threads_are_kept();
  given_up();
  all_that_holds_up_is_told();
  held_up();
  CHECK(plain_objects::references == 0);
}
