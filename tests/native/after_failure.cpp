// What a failed command buffer leaves behind in the other queues and threads:
//   after_failure CASE HOOKS MODE
// Exit status 0 when it went as it should; the reason on stderr otherwise. Each
// sequence is one that MLX's real Metal code has produced.
#include <unistd.h>

#include <atomic>
#include <functional>
#include <map>
#include <thread>

#include "by_hand.h"
#include "drive.h"

namespace {

using drive::new_event;
using drive::new_queue;
using drive::set_value;
using drive::wait_for;
using drive::Work;
using host::selector;

std::uint64_t value_of(const host::Ref& event) {
  return host::send<std::uint64_t>(event.get(), selector("signaledValue"));
}

void fail_next(const host::Ref& queue, std::uint32_t late_us = 0) {
  metalsim_plan plan{};
  plan.nth = 1;
  plan.code = 8;
  plan.queue = queue.get();
  plan.handler_delay_us = late_us;
  METALSIM(metalsim_plan_add)(&plan);
}

// The buffer that fails was to wait for work that takes a while, and whose
// results MLX's handlers let go of: who is told must not go on before it.
void other_work_is_waited_for() {
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
void next_evaluation_waits() {
  host::Ref queue = new_queue(), ready = new_event(), result = new_event();
  std::atomic<bool> done{false};
  fail_next(queue);
  Work(queue).waits(ready, 1).signals(result, 1).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs));
  std::thread producer([&] {
    ::usleep(50'000);
    done = true;
    set_value(ready, 1);
  });
  new_event();  // each evaluation makes one first
  CHECK(done);
  producer.join();
}

// The first buffer fails; its handler signals for it when the GPU has done the
// second's signal of the same event and waits for whoever waits for that.
void late_signal_undoes_nothing() {
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
void own_signals_are_let_go() {
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

const std::map<std::string, std::function<void(const drive::Hooks&)>> kCases = {
    {"other_work_is_waited_for", [](auto&) { other_work_is_waited_for(); }},
    {"next_evaluation_waits", [](auto&) { next_evaluation_waits(); }},
    {"late_signal_undoes_nothing", [](auto&) { late_signal_undoes_nothing(); }},
    {"own_signals_are_let_go", [](auto&) { own_signals_are_let_go(); }},
    {"who_polls_is_let_go", who_polls_is_let_go},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const auto& [name, run] : kCases) std::puts(name.c_str());
    return 0;
  }
  if (argc != 4 || kCases.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: after_failure CASE HOOKS MODE | --list\n");
    return 2;
  }
  alarm(100);
  drive::Hooks hooks = drive::Hooks::open(argv[2]);
  CHECK(hooks.install(argv[3]) == 0);
  kCases.at(argv[1])(hooks);
  // Not through static destructors: the device's threads go on.
  std::fflush(nullptr);
  _exit(0);
}
