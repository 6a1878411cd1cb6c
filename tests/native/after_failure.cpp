// What a failed command buffer leaves behind in the other queues and threads:
//   after_failure CASE HOOKS MODE
// Exit status 0 when it went as it should; the reason on stderr otherwise. Each
// sequence is one that MLX's real Metal code has produced.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <thread>

#include "by_hand.h"
#include "drive.h"

namespace {

using drive::Hooks;
using drive::new_event;
using drive::new_queue;
using drive::Regime;
using drive::set_value;
using drive::told_of_memory;
using drive::value_of;
using drive::wait_for;
using drive::Work;
using host::selector;

Regime g_regime;  // of the hooks

void fail_next(const host::Ref& queue, std::uint32_t late_us = 0) {
  metalsim_plan plan{};
  plan.nth = 1;
  plan.code = 8;
  plan.queue = queue.get();
  plan.handler_delay_us = late_us;
  METALSIM(metalsim_plan_add)(&plan);
}

// Every buffer of this queue fails from now on.
void fail_all(const host::Ref& queue) {
  metalsim_plan plan{};
  plan.nth = plan.persistent = 1;
  plan.code = 8;
  plan.queue = queue.get();
  METALSIM(metalsim_plan_add)(&plan);
}

// The buffer that fails was to wait for work that takes a while, and whose
// results MLX's handlers let go of: who is told must not go on before it.
void other_work_is_waited_for(const Hooks&) {
  for (bool on_cpu : {false, true}) {
    host::Ref one = new_queue(), other = new_queue();
    host::Ref ready = new_event(), result = new_event();
    std::atomic<bool> done{false};
    fail_next(other);
    Work failing(other);
    failing.waits(ready, 1).signals(result, 1).commit();
    std::thread producer([&] {
      ::usleep(50'000);
      done = true;
      if (on_cpu) return set_value(ready, 1);
      Work(one).signals(ready, 1).commit();
    });
    // MLX 0.32 signals it in a handler, the hooks otherwise.
    CHECK(wait_for(result, 1) != "timed out");
    CHECK(done);
    producer.join();
  }
}

// MLX 0.32 finds its error stored, raises it without a wait, and begins anew.
void next_evaluation_waits(const Hooks&) {
  host::Ref queue = new_queue(), ready = new_event(), result = new_event();
  host::Ref short_wait = new_event();
  set_value(short_wait, 1);
  std::atomic<bool> done{false};
  fail_next(queue);
  Work(queue).waits(ready, 1).signals(result, 1).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  std::thread producer([&] {
    ::usleep(50'000);
    done = true;
    set_value(ready, 1);
  });
  // A thread that waits with little time does not spend everybody's.
  CHECK(wait_for(short_wait, 1, 1) == "reached");
  new_event();  // each evaluation makes one first
  CHECK(done);
  producer.join();
}

// The first buffer fails; its handler signals for it when the GPU has done the
// second's signal of the same event and waits for a thread that waits for that.
void late_signal_undoes_nothing(const Hooks&) {
  host::Ref queue = new_queue(), fence = new_event(), back = new_event();
  fail_next(queue, 20'000);
  host::ScopedPool pool;
  auto first = host::send<host::id>(
      queue.get(), selector("commandBufferWithUnretainedReferences"));
  host::send(first, selector("encodeSignalEvent:value:"), fence.get(),
             std::uint64_t{1});
  host::Block handler([fence](host::id) { set_value(fence, 1); });
  host::send(first, selector("addCompletedHandler:"), handler.get());
  host::send(first, selector("commit"));
  host::Ref result = new_event();
  Work(queue).signals(fence, 2).waits(back, 1).signals(result, 1).commit();
  ::usleep(60'000);  // until the handler has run
  std::thread other([&] {
    wait_for(fence, 2);
    set_value(back, 1);
  });
  CHECK(wait_for(result, 1) != "timed out");
  other.join();
}

// MLX 0.32 raises in the midst of encoding for two streams, then waits for the
// first, which waits for what is encoded for the second and not committed.
void own_signals_are_let_go(const Hooks&) {
  host::Ref one = new_queue(), two = new_queue(), fence = new_event();
  fail_next(one);
  Work(one).commit();
  Work held(two);
  held.signals(fence, 1);
  host::ScopedPool pool;
  auto waiting = host::send<host::id>(
      one.get(), selector("commandBufferWithUnretainedReferences"));
  host::send(waiting, selector("encodeWaitForEvent:value:"), fence.get(),
             std::uint64_t{1});
  host::send(waiting, selector("commit"));
  host::send(waiting, selector("waitUntilCompleted"));
  held.commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
}

// The same with the CPU's stream, which MLX waits for first: its thread waits
// for what is not committed yet. MLX is raising already, so this is no fault.
void cpu_stream_is_let_go(const drive::Hooks& hooks) {
  hooks.set_gate_limit(60'000);  // it is not that which ends it
  host::Ref one = new_queue(), two = new_queue(), fence = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(one);
  Work held(two);
  held.signals(fence, 1);
  Work(one).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  std::thread stream([&] {
    hooks.mark_thread(0);
    CHECK(wait_for(fence, 1, ~std::uint64_t{0}) == "reached");
  });
  stream.join();
  held.commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(hooks.epoch() == before + 1);
  CHECK(hooks.count().gate_limit == 0);
}

// Waits as a CPU stream's thread does, for ever; `reached` when it is through.
std::thread cpu_stream(const drive::Hooks& hooks, const host::Ref& event,
                       std::atomic<bool>& reached) {
  return std::thread([&hooks, &event, &reached] {
    hooks.mark_thread(0);
    CHECK(wait_for(event, 1, ~std::uint64_t{0}) == "reached");
    reached = true;
  });
}

// MLX 0.32.1 to 0.32.3: what the CPU's stream waits for is committed, and held
// up by what is not, over two queues and behind a buffer of its own queue.
void cpu_stream_is_let_go_behind_committed(const drive::Hooks& hooks) {
  hooks.set_gate_limit(60'000);
  host::Ref one = new_queue(), two = new_queue(), three = new_queue();
  host::Ref fence = new_event(), next = new_event(), last = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(one);
  Work(one).commit();
  Work held(one);
  held.signals(fence, 1);
  Work(two).waits(fence, 1).signals(next, 1).commit();
  Work(three).waits(next, 1).commit();
  Work(three).signals(last, 1).commit();
  std::atomic<bool> reached{false};
  cpu_stream(hooks, last, reached).join();
  // The queues are free, too, before that is committed.
  host::Ref later = new_event();
  Work(two).signals(later, 1).commit();
  Work(three).waits(later, 1).signals(later, 2).commit();
  CHECK(wait_for(later, 2) == "reached");
  held.commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(hooks.epoch() == before + 1);
  CHECK(hooks.count().gate_limit == 0);
}

// The same when nothing of it is held up for good: the thread is slow, another
// thread has failed, or the CPU is to signal.
void slow_threads_are_waited_for(const drive::Hooks& hooks) {
  hooks.set_gate_limit(60'000);
  enum Slow { kNothingFailed, kAnotherFailed, kFailedLongAgo, kCpu };
  for (Slow slow : {kNothingFailed, kAnotherFailed, kFailedLongAgo, kCpu}) {
    host::Ref one = new_queue(), two = new_queue();
    host::Ref fence = new_event(), last = new_event();
    auto fail = [&] {
      fail_next(one);
      Work(one).commit();
      CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
    };
    if (slow == kAnotherFailed) std::thread(fail).join();
    if (slow == kFailedLongAgo) {
      fail();
      ::usleep(300'000);
    }
    if (slow == kCpu) fail();
    Work held(one);
    if (slow != kCpu) held.signals(fence, 1);
    Work(two).waits(fence, 1).signals(last, 1).commit();
    std::atomic<bool> reached{false};
    std::thread stream = cpu_stream(hooks, last, reached);
    ::usleep(2'700'000);
    CHECK(!reached);
    if (slow == kCpu) set_value(fence, 1);
    held.commit();
    stream.join();
  }
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(hooks.count().gate_limit == 0);
}

// Two threads encode: what the one holds up is ended, as it has failed, and
// what the other holds up is not.
void only_the_failed_thread_is_hurried(const drive::Hooks& hooks) {
  hooks.set_gate_limit(60'000);
  host::Ref queues[] = {new_queue(), new_queue(), new_queue(), new_queue()};
  host::Ref fences[] = {new_event(), new_event()};
  host::Ref lasts[] = {new_event(), new_event()};
  std::atomic<bool> reached[] = {{false}, {false}};
  std::atomic<bool> encoded{false}, go_on{false};
  std::thread other([&] {
    Work held(queues[2]);
    held.signals(fences[1], 1);
    Work(queues[3]).waits(fences[1], 1).signals(lasts[1], 1).commit();
    encoded = true;
    while (!go_on) ::usleep(1000);
    held.commit();
  });
  while (!encoded) std::this_thread::yield();
  fail_next(queues[0]);
  Work(queues[0]).commit();
  Work held(queues[0]);
  held.signals(fences[0], 1);
  Work(queues[1]).waits(fences[0], 1).signals(lasts[0], 1).commit();
  std::thread one = cpu_stream(hooks, lasts[0], reached[0]);
  std::thread two = cpu_stream(hooks, lasts[1], reached[1]);
  one.join();
  ::usleep(1'200'000);
  CHECK(!reached[1]);
  go_on = true;
  two.join();
  other.join();
  held.commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(hooks.count().gate_limit == 0);
}

// All signals of a failed buffer are done at once, so also one that depends on
// whoever waits for an earlier one.
void later_signal_holds_nothing_up(const drive::Hooks& hooks) {
  hooks.set_gate_limit(3000);
  host::Ref one = new_queue(), two = new_queue();
  host::Ref fence = new_event(), ready = new_event(), back = new_event();
  fail_next(one);
  Work(one).signals(fence, 1).waits(ready, 1).signals(fence, 2).commit();
  Work(two).waits(back, 1).signals(ready, 1).commit();
  ::usleep(30'000);  // until both are done
  std::thread stream([&] {
    hooks.mark_thread(0);
    CHECK(wait_for(fence, 1, ~std::uint64_t{0}) == "reached");
    set_value(back, 1);
  });
  CHECK(wait_for(fence, 2) != "timed out");
  stream.join();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(hooks.count().gate_limit == 0);
}

// A thread that may not be told asks again and again.
void who_polls_is_let_go(const drive::Hooks& hooks) {
  host::Ref queue = new_queue(), event = new_event(), next = new_event();
  fail_next(queue);
  Work(queue).signals(event, 1).commit();
  std::thread poller([&] {
    hooks.mark_thread(0);
    while (value_of(event) < 1) std::this_thread::yield();
    set_value(next, 1);
  });
  std::string told = wait_for(next, 1);
  CHECK(told.find("00000008") != std::string::npos);
  poller.join();
}

// ---- in what order
// --------------------------------------------------------

bool told_once(const Hooks& hooks, std::uint64_t before,
               const std::string& said) {
  return drive::told_once(hooks, g_regime, before, said);
}

// What is in flight when somebody is told may rest on what failed, what is
// committed later does not.
void in_flight_counts_as_failed(const Hooks& hooks) {
  host::Ref queue = new_queue(), gate = new_event();
  host::Ref first = new_event(), second = new_event(), later = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(queue);
  Work(queue).commit();
  Work(queue).signals(first, 1).commit();
  Work(queue).waits(gate, 1).signals(second, 1).commit();
  CHECK(told_once(hooks, before, wait_for(first, 1)));
  set_value(gate, 1);
  CHECK(told_once(hooks, before, wait_for(second, 1)));
  Work(queue).signals(later, 1).commit();
  CHECK(wait_for(later, 1) == "reached");
}

// The same for a queue that the failure comes to when it was told already.
void told_failure_comes_in(const Hooks& hooks) {
  host::Ref one = new_queue(), two = new_queue(), gate = new_event();
  host::Ref failed = new_event(), result = new_event(), later = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(one);
  Work(one).signals(failed, 1).commit();
  CHECK(told_once(hooks, before, wait_for(failed, 1)));
  Work(two).waits(failed, 1).waits(gate, 1).commit();
  Work(two).signals(result, 1).commit();
  set_value(gate, 1);
  CHECK(told_once(hooks, before, wait_for(result, 1)));
  Work(two).signals(later, 1).commit();
  CHECK(wait_for(later, 1) == "reached");
}

// The handlers of the failed buffer run long after those of the buffer that
// has waited for its queue.
void handlers_of_another_queue_are_late(const Hooks& hooks) {
  METALSIM(metalsim_set_completion_by_queue)(1);
  for (bool through_queue : {false, true}) {
    host::Ref one = new_queue(), other = new_queue();
    host::Ref event = new_event(), result = new_event();
    std::uint64_t before = hooks.epoch();
    fail_next(one, 100'000);
    Work(one).commit();  // mid-graph
    Work(one).signals(event, 5).commit();
    if (through_queue) {
      Work(other).waits(event, 5).signals(result, 1).commit();
      CHECK(told_once(hooks, before, wait_for(result, 1)));
    } else {
      wait_for(event, 3);  // a value that this signal passes over
      CHECK(hooks.epoch() == before + 1);
      CHECK(told_once(hooks, before, wait_for(event, 5)));
    }
  }
  CHECK(hooks.count().gate_limit == 0);
}

// Another's signal of a higher or lower value, which has not come, is none that
// was waited for: who comes first would wait for who waits for him.
void other_values_are_not_waited_for(const Hooks& hooks) {
  host::Ref one = new_queue(), two = new_queue(), gate = new_event();
  host::Ref set = new_event(), result = new_event(), event = new_event();
  set_value(set, 3);
  Work(one).waits(gate, 1).signals(set, 5).signals(event, 3).commit();
  Work(two).waits(set, 3).signals(result, 1).signals(event, 5).commit();
  CHECK(wait_for(result, 1) == "reached");
  CHECK(wait_for(event, 5) == "reached");
  CHECK(value_of(event) == 5);
  CHECK(hooks.count().gate_limit == 0);
  set_value(gate, 1);
  CHECK(wait_for(set, 5) == "reached");
}

// A queue dies, and its address is used again, when its last buffer has run and
// what that waited for has not settled.
void queue_dies_unsettled(const Hooks& hooks) {
  METALSIM(metalsim_set_completion_by_queue)(1);
  host::Ref one = new_queue(), event = new_event(), result = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(one, 200'000);
  Work(one).commit();
  Work(one).signals(event, 1).commit();
  {
    host::Ref dies = new_queue();
    Work(dies).waits(event, 1).signals(result, 1).commit();
    ::usleep(50'000);  // until its handlers have run
  }
  host::Ref again = new_queue();
  CHECK(told_once(hooks, before, wait_for(result, 1)));
  CHECK(hooks.count().gate_limit == 0);
}

// More failures of one event than are kept apart, and not in order.
void many_failures_of_one_event(const Hooks&) {
  host::Ref queue = new_queue(), event = new_event();
  fail_all(queue);
  for (std::uint64_t value = 0; value < 100; ++value) {
    Work(queue).signals(event, value == 1 ? 1 : 1000 + value).commit();
    CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  }
  for (std::uint64_t value : {1, 1000, 1050, 1099})
    CHECK(g_regime == Regime::kObserve ||
          told_of_memory(wait_for(event, value)));
}

// The address of a queue that has failed is another's.
void queue_address_is_used_again(const Hooks&) {
  {
    host::Ref queue = new_queue();
    fail_next(queue);
    Work(queue).commit();
    CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  }
  host::Ref queue = new_queue(), event = new_event();
  Work(queue).signals(event, 1).commit();
  CHECK(wait_for(event, 1) == "reached");
}

// A thread that may not be told asks, and goes on when it is known whether what
// it asks for is good.
void who_polls_waits_for_handlers(const Hooks& hooks) {
  host::Ref queue = new_queue(), event = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(queue, 50'000);
  Work(queue).commit();
  Work(queue).signals(event, 1).commit();
  std::thread poller([&] {
    hooks.mark_thread(0);
    while (value_of(event) < 1) std::this_thread::yield();
    CHECK(hooks.epoch() == before + 1);
  });
  poller.join();
}

// R18: a CPU stream's thread that has worked on failed data works on good data
// next.
void cpu_thread_is_good_again(const Hooks& hooks) {
  host::Ref queue = new_queue(), failed = new_event();
  host::Ref result = new_event(), next = new_event();
  std::uint64_t before = hooks.epoch();
  std::atomic<bool> told{false};
  fail_next(queue);
  Work(queue).signals(failed, 1).commit();
  std::thread cpu([&] {
    hooks.mark_thread(0);
    wait_for(failed, 1);
    set_value(result, 1);
    while (!told) std::this_thread::yield();
    set_value(next, 1);
  });
  CHECK(told_once(hooks, before, wait_for(result, 1)));
  told = true;
  CHECK(wait_for(next, 1) == "reached");
  cpu.join();
}

// ---- what is let go of
// ----------------------------------------------------

// MLX 0.32 raises before it has committed what its own CPU stream waits for.
void nobody_commits(const Hooks& hooks) {
  hooks.set_gate_limit(600);
  host::Ref queue = new_queue(), event = new_event(), result = new_event();
  std::uint64_t before = hooks.epoch();
  Work held(queue);
  held.signals(event, 1);
  // What it waits for is committed, and waits for what is not.
  host::Ref other = new_queue(), last = new_event();
  Work(other).waits(event, 1).signals(last, 1).commit();
  held.signals(event, 2);
  Work(other).waits(event, 2).signals(last, 2).commit();
  std::atomic<bool> let_go{false};
  std::thread cpu([&] {
    hooks.mark_thread(0);
    CHECK(wait_for(last, 1, ~std::uint64_t{0}) == "reached");
    let_go = true;
    hooks.set_gate_limit(60'000);  // it is given up: the next wait is short
    CHECK(wait_for(last, 2, ~std::uint64_t{0}) == "reached");
    set_value(result, 1);
  });
  ::usleep(1'300'000);
  CHECK(!let_go);  // nothing has failed: it may only be slow
  fail_next(queue);
  Work(queue).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  CHECK(wait_for(result, 1) != "reached");  // it is not known what it read
  cpu.join();
  CHECK(hooks.epoch() == before + 3);
  CHECK(hooks.count().gate_limit == 2);
  held.commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
}

// What a failed buffer did not wait for may itself be waiting for what this
// thread has encoded and not committed.
void encoding_waits_for_nobody(const Hooks& hooks) {
  host::Ref one = new_queue(), two = new_queue();
  host::Ref ready = new_event(), fence = new_event();
  fail_next(one);
  Work(one).waits(ready, 1).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  Work held(two);
  held.signals(fence, 1);
  std::thread cpu([&] {
    hooks.mark_thread(0);
    wait_for(fence, 1);
    set_value(ready, 1);
  });
  new_event();
  held.commit();
  cpu.join();
  CHECK(hooks.count().gate_limit == 0);
}

// Where no thread of Python's comes by, what failed buffers did not wait for is
// forgotten when it has come.
void skipped_waits_are_forgotten(const Hooks& hooks) {
  hooks.mark_thread(0);
  host::Ref queue = new_queue();
  fail_all(queue);
  for (int i = 0; i < 200; ++i) {
    host::Ref event = new_event();
    Work(queue).waits(event, 1).commit();
    CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
    set_value(event, 1);
  }
  CHECK(METALSIM(metalsim_live_objects)("_MTLSharedEvent") < 10);
}

// MLX 0.31.2 synchronizes with a buffer of its own, and asks that for its
// status, then for the error's text: it crashes where there is no error.
void synchronize_tells(const Hooks& hooks) {
  for (bool has_error : {true, false}) {
    host::Ref queue = new_queue();
    std::uint64_t before = hooks.epoch();
    metalsim_plan plan{};
    plan.nth = 1;
    plan.code = 8;
    plan.queue = queue.get();
    plan.error_shape = has_error ? 0 : METALSIM_ERROR_NIL;
    METALSIM(metalsim_plan_add)(&plan);
    Work(queue).commit();
    host::ScopedPool pool;
    auto last = host::send<host::id>(
        queue.get(), selector("commandBufferWithUnretainedReferences"));
    host::send(last, selector("commit"));
    host::send(last, selector("waitUntilCompleted"));
    CHECK(hooks.epoch() == before + 1);
    std::thread other([&] {
      hooks.mark_thread(0);  // it cannot raise
      CHECK(!host::has_failed(last));
    });
    other.join();
    std::string said;
    try {
      if (host::has_failed(last)) said = host::message_of(last);
    } catch (const std::exception& e) {
      said = e.what();
    }
    if (g_regime == Regime::kObserve) {
      CHECK(said.empty());  // MLX has its own
    } else {
      CHECK(has_error ? told_of_memory(said)
                      : said.find("unknown error") != std::string::npos);
    }
    CHECK(!host::has_failed(last));  // told once
    CHECK(host::send<host::id>(last, selector("error")) == nullptr);
  }
}

// What was waited for is known to be good, or not, when the wait returns.
void wait_until_completed(const Hooks& hooks) {
  METALSIM(metalsim_set_completion_by_queue)(1);
  host::Ref one = new_queue(), other = new_queue(), event = new_event();
  host::Ref skipped = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next(one, 100'000);
  Work(one).waits(skipped, 1).commit();
  Work(one).signals(event, 1).commit();
  host::ScopedPool pool;
  auto last = host::send<host::id>(
      other.get(), selector("commandBufferWithUnretainedReferences"));
  host::send(last, selector("encodeWaitForEvent:value:"), event.get(),
             std::uint64_t{1});
  host::send(last, selector("commit"));
  std::atomic<bool> done{false};
  std::thread producer([&] {
    ::usleep(200'000);
    done = true;
    set_value(skipped, 1);
  });
  ::usleep(20'000);  // until its own handlers have run
  host::send(last, selector("waitUntilCompleted"));
  CHECK(hooks.epoch() == before + 1);
  CHECK(done);
  producer.join();
}

// Several buffers of one evaluation fail, with the CPU's stream between them:
// told of one, nobody is told of the others when that stream goes on.
void told_once_of_several(const drive::Hooks& hooks) {
  host::Ref one = new_queue(), two = new_queue();
  host::Ref fence = new_event(), back = new_event(), result = new_event();
  host::Ref later = new_event();
  fail_next(one);
  Work(one).signals(fence, 1).commit();
  std::atomic<bool> passed_on{false}, go_on{false};
  std::thread stream([&] {
    hooks.mark_thread(0);
    wait_for(fence, 1, ~std::uint64_t{0});
    set_value(back, 1);
    passed_on = true;
    while (!go_on) std::this_thread::yield();
    set_value(later, 1);
  });
  while (!passed_on) std::this_thread::yield();
  fail_next(two);
  Work(two).waits(back, 1).signals(result, 1).commit();
  CHECK(wait_for(result, 1).find("00000008") != std::string::npos);
  go_on = true;
  CHECK(wait_for(later, 1) == "reached");
  stream.join();
}

// Where a case does not run in both regimes:
// - who_polls_is_let_go: in observe nothing is marked, so nobody's poll is held
//   back for good
// - nobody_commits: in observe nobody is told of what was read too early
// - cpu_stream_is_let_go and its like: as MLX 0.32 alone raises
// - told_once_of_several: in observe MLX tells
struct Case {
  void (*run)(const Hooks&);
  drive::In in;
};
using drive::kBoth;
using drive::kIntercept;
using drive::kObserve;
const std::map<std::string, Case> kCases = {
    {"other_work_is_waited_for", {other_work_is_waited_for, kBoth}},
    {"next_evaluation_waits", {next_evaluation_waits, kBoth}},
    {"late_signal_undoes_nothing", {late_signal_undoes_nothing, kBoth}},
    {"own_signals_are_let_go", {own_signals_are_let_go, kBoth}},
    {"cpu_stream_is_let_go", {cpu_stream_is_let_go, kObserve}},
    {"cpu_stream_is_let_go_behind_committed",
     {cpu_stream_is_let_go_behind_committed, kObserve}},
    {"slow_threads_are_waited_for", {slow_threads_are_waited_for, kBoth}},
    {"only_the_failed_thread_is_hurried",
     {only_the_failed_thread_is_hurried, kObserve}},
    {"later_signal_holds_nothing_up", {later_signal_holds_nothing_up, kBoth}},
    {"told_once_of_several", {told_once_of_several, kIntercept}},
    {"who_polls_is_let_go", {who_polls_is_let_go, kIntercept}},
    {"in_flight_counts_as_failed", {in_flight_counts_as_failed, kBoth}},
    {"told_failure_comes_in", {told_failure_comes_in, kBoth}},
    {"handlers_of_another_queue_are_late",
     {handlers_of_another_queue_are_late, kBoth}},
    {"other_values_are_not_waited_for",
     {other_values_are_not_waited_for, kBoth}},
    {"queue_dies_unsettled", {queue_dies_unsettled, kBoth}},
    {"queue_address_is_used_again", {queue_address_is_used_again, kBoth}},
    {"who_polls_waits_for_handlers", {who_polls_waits_for_handlers, kBoth}},
    {"cpu_thread_is_good_again", {cpu_thread_is_good_again, kBoth}},
    {"many_failures_of_one_event", {many_failures_of_one_event, kBoth}},
    {"nobody_commits", {nobody_commits, kIntercept}},
    {"encoding_waits_for_nobody", {encoding_waits_for_nobody, kBoth}},
    {"skipped_waits_are_forgotten", {skipped_waits_are_forgotten, kBoth}},
    {"synchronize_tells", {synchronize_tells, kBoth}},
    {"wait_until_completed", {wait_until_completed, kBoth}},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const auto& [name, one] : kCases) drive::list_case(name, one.in);
    return 0;
  }
  if (argc != 4 || kCases.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: after_failure CASE HOOKS MODE | --list\n");
    return 2;
  }
  alarm(100);
  drive::Hooks hooks = drive::Hooks::open(argv[2]);
  CHECK(hooks.install(argv[3]) == 0);
  g_regime = std::strcmp(argv[3], "intercept") == 0 ? Regime::kIntercept
                                                    : Regime::kObserve;
  kCases.at(argv[1]).run(hooks);
  // Not through static destructors: the device's threads go on.
  std::fflush(nullptr);
  _exit(0);
}
