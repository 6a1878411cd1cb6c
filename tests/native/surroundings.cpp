// The hooks in bad surroundings, one case for each run:
//   surroundings CASE HOOKS TWIN REGIME
// Exit status 0 when it went as it should; the reason on stderr otherwise.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <thread>
#include <vector>

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

const char* g_hooks_path;
const char* g_twin_path;
Regime g_regime;  // of the MLX that is driven, and of the hooks

int install(const Hooks& hooks) {
  return hooks.install(drive::name_of(g_regime));
}

Hooks installed() {
  Hooks hooks = Hooks::open(g_hooks_path);
  CHECK(install(hooks) == 0);
  return hooks;
}

std::string try_buffer() { return drive::try_buffer(g_regime); }

void fail_next(int code = 8) { METALSIM(metalsim_plan_fail)(1, code, 0, 0); }

// A fault is told once, then work goes on.
void check_protected(const Hooks& hooks) {
  for (int i = 0; i < 3; ++i) {
    std::uint64_t before = hooks.epoch();
    fail_next();
    CHECK(told_of_memory(try_buffer()));
    CHECK(hooks.epoch() == before + 1);
    CHECK(try_buffer().empty());
  }
}

void no_device() {
  METALSIM(metalsim_set_no_device)(1);
  Hooks hooks = Hooks::open(g_hooks_path);
  CHECK(install(hooks) != 0);
}

void missing_selector() {
  drive::device();  // its classes are registered with the first device
  CHECK(METALSIM(metalsim_remove_selector)("encodeWaitForEvent:value:") > 0);
  Hooks hooks = Hooks::open(g_hooks_path);
  CHECK(install(hooks) != 0);
  CHECK(METALSIM(metalsim_modified_methods)() == 0);
  CHECK(try_buffer().empty());  // the host goes on
}

// Metal's methods belong to classes that have none above them.
void rootless() {
  METALSIM(metalsim_set_rootless)(1);
  Hooks hooks = installed();
  check_protected(hooks);
}

// What the hooks send and do not replace can be missing as well.
void missing_queue() {
  drive::device();
  CHECK(METALSIM(metalsim_remove_selector)("commandQueue") > 0);
  Hooks hooks = Hooks::open(g_hooks_path);
  CHECK(install(hooks) != 0);
  CHECK(try_buffer().empty());
}

// ---- another library that replaces a method
// ------------------------------------

// Replaces the method of the object's class; returns what was there.
host::IMP replace(host::id object, const char* name, host::IMP with) {
  auto get_class = host::function<host::Class(host::id)>("object_getClass");
  auto method_of = host::function<host::Method(host::Class, host::SEL)>(
      "class_getInstanceMethod");
  auto set = host::function<host::IMP(host::Method, host::IMP)>(
      "method_setImplementation");
  return set(method_of(get_class(object), selector(name)), with);
}

using Commit = void (*)(host::id, host::SEL);
Commit g_foreign_original;
std::atomic<int> g_foreign_calls{0};

void foreign_commit(host::id self, host::SEL cmd) {
  ++g_foreign_calls;
  g_foreign_original(self, cmd);
}

void replace_commit() {
  host::ScopedPool pool;
  auto buffer = host::send<host::id>(drive::queue(), selector("commandBuffer"));
  g_foreign_original = reinterpret_cast<Commit>(
      replace(buffer, "commit", reinterpret_cast<host::IMP>(&foreign_commit)));
}

void replaced_before() {
  replace_commit();
  Hooks hooks = installed();
  check_protected(hooks);
  CHECK(g_foreign_calls > 0);
  hooks.uninstall();
  int calls = g_foreign_calls;
  CHECK(try_buffer().empty());
  CHECK(g_foreign_calls == calls + 1);
}

void replaced_after() {
  Hooks hooks = installed();
  replace_commit();
  check_protected(hooks);
  hooks.uninstall();  // ours stays below theirs and only passes on
  std::uint64_t before = hooks.epoch();
  CHECK(try_buffer().empty());
  CHECK(hooks.epoch() == before);
  CHECK(install(hooks) == 0);
  check_protected(hooks);
}

void twin() {
  Hooks one = Hooks::open(g_hooks_path), two = Hooks::open(g_twin_path);
  CHECK(one.install != two.install);
  CHECK(install(one) == 0);
  CHECK(install(two) == 0);
  for (const Hooks& hooks : {one, two}) check_protected(hooks);
  CHECK(one.epoch() == two.epoch());
  one.uninstall();  // not the one on top
  check_protected(two);
  two.uninstall();
  CHECK(try_buffer().empty());
}

// ---- time and threads
// -----------------------------------------------------------

void rounds() {
  Hooks hooks = Hooks::open(g_hooks_path);
  for (int i = 0; i < 2000; ++i) {
    CHECK(hooks.install(i % 2 ? "observe" : "intercept") == 0);
    hooks.uninstall();
  }
  CHECK(install(hooks) == 0);
  check_protected(hooks);
}

// Buffers run on other threads, and events are polled, while the hooks come and
// go.
void install_during_work() {
  Hooks hooks = Hooks::open(g_hooks_path);
  host::Ref polled = new_event();
  std::atomic<bool> stop{false};
  std::atomic<int> ran{0}, bad{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      while (!stop) {
        std::string said = try_buffer();
        if (!said.empty()) ++bad;
        if (value_of(polled) != 0) ++bad;
        ++ran;
      }
    });
  while (ran == 0) std::this_thread::yield();
  for (int i = 0; i < 200; ++i) {
    CHECK(hooks.install(i % 2 ? "observe" : "intercept") == 0);
    std::this_thread::yield();
    hooks.uninstall();
  }
  stop = true;
  for (auto& t : threads) t.join();
  CHECK(bad == 0);
  CHECK(install(hooks) == 0);
  check_protected(hooks);
}

using WaitForEvent = bool (*)(host::id, host::SEL, std::uint64_t,
                              std::uint64_t);
WaitForEvent g_wait_original;
std::atomic<bool> g_waiting{false};

bool noted_wait(host::id self, host::SEL cmd, std::uint64_t value,
                std::uint64_t timeout_ms) {
  g_waiting = true;
  return g_wait_original(self, cmd, value, timeout_ms);
}

// From now on `g_waiting` says that somebody waits. Before an install: then
// whoever waits is inside the hook.
void note_waits() {
  host::Ref event = host::Ref::take(
      host::send<host::id>(drive::device(), selector("newSharedEvent")));
  g_wait_original = reinterpret_cast<WaitForEvent>(
      replace(event.get(), "waitUntilSignaledValue:timeoutMS:",
              reinterpret_cast<host::IMP>(&noted_wait)));
}

void uninstall_in_flight() {
  note_waits();
  Hooks hooks = installed();
  METALSIM(metalsim_hold_handlers)(1);
  std::string said = "not run";
  std::uint64_t before = hooks.epoch();
  fail_next();
  g_waiting = false;
  std::thread waiting([&] {
    hooks.mark_thread(1);
    said = try_buffer();
  });
  while (!g_waiting) std::this_thread::yield();
  hooks.uninstall();  // its handlers are still wrapped: nothing may terminate
  METALSIM(metalsim_hold_handlers)(0);
  waiting.join();
  CHECK(told_of_memory(said));  // it was protected when it began
  CHECK(hooks.epoch() == before + 1);
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
}

void forked() {
  Hooks hooks = installed();
  check_protected(hooks);
  // The simulation's thread may hold one of its locks, which nobody in the
  // child would give back.
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
  pid_t child = fork();
  if (child == 0) {
    // Metal is of no use here, but none of our code may hang or crash.
    hooks.uninstall();
    _exit(hooks.epoch() > 0 ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  check_protected(hooks);
}

void debug_layer() {
  METALSIM(metalsim_set_debug_layer)
  (METALSIM_DEBUG_BUFFERS | METALSIM_DEBUG_EVENTS);
  Hooks hooks = installed();
  check_protected(hooks);  // each fault counts once, though two layers see it
}

// A class that is seen for the first time after the install.
void late_class() {
  Hooks hooks = installed();
  METALSIM(metalsim_set_family)(1);
  check_protected(hooks);
}

// No two buffers alive at once, so every address is used again and again.
void address_reuse() {
  Hooks hooks = installed();
  for (int i = 0; i < 500; ++i) {
    {
      // A buffer with a signal that is dropped without a commit.
      host::ScopedPool pool;
      host::Ref event = host::Ref::take(
          host::send<host::id>(drive::device(), selector("newSharedEvent")));
      auto buffer = host::send<host::id>(
          drive::queue(), selector("commandBufferWithUnretainedReferences"));
      host::send(buffer, selector("encodeSignalEvent:value:"), event.get(),
                 std::uint64_t{1});
    }
    CHECK(hooks.count().buffer_records == 0);
    check_protected(hooks);
  }
  // Nothing is remembered of buffers and events that are gone, failed or not.
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
  CHECK(hooks.count().buffer_records == 0);
  CHECK(hooks.count().event_records == 0);
}

// Whatever a handler throws, the next one is called and nothing gets out.
void strange_exceptions() {
  Hooks hooks = installed();
  host::ScopedPool pool;
  std::uint64_t before = hooks.epoch();
  std::atomic<int> called{0};
  auto buffer = host::send<host::id>(
      drive::queue(), selector("commandBufferWithUnretainedReferences"));
  std::vector<host::Block> handlers;
  for (int i = 0; i < 4; ++i)
    handlers.emplace_back([&called, i](host::id) {
      CHECK(called++ == i);
      if (i == 1) throw 42;
      if (i == 2) throw std::logic_error("a bug in a handler");
    });
  for (auto& handler : handlers)
    host::send(buffer, selector("addCompletedHandler:"), handler.get());
  host::send(buffer, selector("commit"));
  host::send(buffer, selector("waitUntilCompleted"));
  CHECK(called == 4);
  CHECK(hooks.epoch() == before + 2);  // not lost: they are in the log
}

void observe_counts() {
  Hooks hooks = installed();
  METALSIM(metalsim_set_handler_delay_us)(3000);
  for (int i = 0; i < 20; ++i) {
    host::ScopedPool pool;
    std::uint64_t before = hooks.epoch();
    fail_next();
    auto buffer = host::send<host::id>(
        drive::queue(), selector("commandBufferWithUnretainedReferences"));
    host::send(buffer, selector("commit"));  // mid-graph: signals nothing
    auto last = host::send<host::id>(
        drive::queue(), selector("commandBufferWithUnretainedReferences"));
    host::Ref event = host::Ref::take(
        host::send<host::id>(drive::device(), selector("newSharedEvent")));
    host::send(last, selector("encodeSignalEvent:value:"), event.get(),
               std::uint64_t{1});
    host::send(last, selector("commit"));
    CHECK(host::send<bool>(event.get(),
                           selector("waitUntilSignaledValue:timeoutMS:"),
                           std::uint64_t{1}, drive::kLongMs));
    CHECK(hooks.epoch() == before + 1);
  }
}

// ---- events and buffers by hand
// -----------------------------------------------

bool told_once(const Hooks& hooks, std::uint64_t before,
               const std::string& said) {
  return drive::told_once(hooks, g_regime, before, said);
}

// MLX 0.32 signals the events of a failed buffer in a handler of its own,
// before the handler that counts the failure has run.
void signalled_in_handler() {
  Hooks hooks = installed();
  for (bool waiting : {false, true}) {
    host::ScopedPool pool;
    host::Ref queue = new_queue(), event = new_event();
    std::uint64_t before = hooks.epoch();
    fail_next();
    auto buffer = host::send<host::id>(
        queue.get(), selector("commandBufferWithUnretainedReferences"));
    host::send(buffer, selector("encodeSignalEvent:value:"), event.get(),
               std::uint64_t{1});
    host::Block handler([event](host::id) {
      set_value(event, 1);
      ::usleep(20'000);
    });
    host::send(buffer, selector("addCompletedHandler:"), handler.get());
    host::send(buffer, selector("commit"));
    if (waiting) {
      CHECK(wait_for(event, 1) == "reached");
    } else {
      while (value_of(event) == 0) std::this_thread::yield();
    }
    CHECK(hooks.epoch() == before + 1);
  }
}

// R18: a CPU stream's thread is busy with failed data while others are told, of
// this failure or of another. What it signals at last is failed all the same.
void cpu_thread_told_late() {
  Hooks hooks = installed();
  for (bool unrelated : {false, true}) {
    host::Ref queue = new_queue(), other = new_queue();
    host::Ref failed = new_event(), result = new_event(), beside = new_event();
    fail_next();
    Work(queue).signals(failed, 1).commit();
    CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
    std::atomic<bool> waited{false}, told{false};
    std::thread cpu([&] {
      hooks.mark_thread(0);
      CHECK(wait_for(failed, 1) == "reached");
      waited = true;
      while (!told) std::this_thread::yield();
      set_value(result, 1);
    });
    while (!waited) std::this_thread::yield();
    if (unrelated) {
      fail_next();
      Work(other).signals(beside, 1).commit();
      CHECK(told_of_memory(wait_for(beside, 1)));
    } else {
      CHECK(told_of_memory(wait_for(failed, 1)));
    }
    told = true;
    cpu.join();
    CHECK(told_of_memory(wait_for(result, 1)));
  }
  check_protected(hooks);
}

// A buffer waits for an event that dies, and whose address is used again,
// before the buffer has settled.
void waited_event_dies() {
  Hooks hooks = installed();
  for (bool failing : {true, false}) {
    host::Ref queue = new_queue(), first = new_queue(), second = new_queue();
    host::Ref late = new_event(), result = new_event();
    std::uint64_t before = hooks.epoch();
    {
      host::Ref early = new_event();
      if (failing) fail_next();
      Work(first).signals(early, 1).commit();
      METALSIM(metalsim_set_handler_delay_us)(200000);
      Work(second).signals(late, 1).commit();
      METALSIM(metalsim_set_handler_delay_us)(0);
      Work(queue).waits(early, 1).waits(late, 1).signals(result, 1).commit();
    }
    usleep(20000);
    host::Ref again = new_event();
    Work(queue).signals(again, 1).commit();
    std::string said = wait_for(result, 1);
    CHECK(failing ? told_once(hooks, before, said) : said == "reached");
    if (!failing) CHECK(wait_for(again, 1) == "reached");
  }
  CHECK(hooks.count().gate_limit == 0);
}

// Values below and out of order, as on a counter.
void counters() {
  Hooks hooks = installed();
  host::Ref queue = new_queue(), other = new_queue();
  host::Ref failed = new_event(), result = new_event();
  std::uint64_t before = hooks.epoch();
  fail_next();
  Work(queue).signals(failed, 5).commit();
  CHECK(told_once(hooks, before, wait_for(failed, 3)));
  CHECK(told_once(hooks, before, wait_for(failed, 5)));
  Work(other).waits(failed, 3).signals(result, 1).commit();
  CHECK(told_once(hooks, before, wait_for(result, 1)));

  host::Ref counter = new_event(), one = new_event(), two = new_event();
  set_value(counter, 5);
  Work a(queue), b(queue);
  a.waits(counter, 5).signals(one, 1);
  b.signals(counter, 3).signals(two, 1);
  a.commit();
  b.commit();
  CHECK(wait_for(one, 1) == "reached");
  CHECK(wait_for(two, 1) == "reached");
  CHECK(hooks.count().gate_limit == 0);
}

void caller_has_less_time() {
  Hooks hooks = installed();
  host::Ref queue = new_queue(), event = new_event();
  METALSIM(metalsim_hold_handlers)(1);
  Work(queue).signals(event, 1).commit();
  CHECK(wait_for(event, 1, 50) == "timed out");
  METALSIM(metalsim_hold_handlers)(0);
  CHECK(wait_for(event, 1) == "reached");
  CHECK(hooks.count().gate_limit == 0);
  CHECK(hooks.count().event_records == 0);  // though the event lives
}

// R19: a wait that is let go does not pass for one that went well.
void handlers_never_run() {
  Hooks hooks = installed();
  hooks.set_gate_limit(100);
  METALSIM(metalsim_hold_handlers)(1);
  for (bool raises : {true, false}) {
    host::Ref queue = new_queue(), event = new_event(), result = new_event();
    std::uint64_t before = hooks.epoch();
    Work(queue).signals(event, 1).commit();
    hooks.mark_thread(raises);
    std::string said = wait_for(event, 1);
    CHECK(hooks.epoch() == before + 1);
    if (g_regime == Regime::kObserve) {
      CHECK(said == "reached");  // the epoch is all that MLX is told
    } else if (raises) {
      CHECK(said.find("handlers did not run in") != std::string::npos);
    } else {
      CHECK(said == "reached");
      set_value(result, 1);  // as MLX's CPU thread, from the data it waited for
      hooks.mark_thread(1);
      CHECK(wait_for(result, 1) != "reached");
    }
  }
  CHECK(hooks.count().gate_limit == 2);
  METALSIM(metalsim_hold_handlers)(0);
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
}

// Another process, which lets this one go on some seconds after it is told.
// Made before there are threads.
class Waker {
 public:
  explicit Waker(unsigned seconds) {
    CHECK(pipe(ends_) == 0);
    pid_t sleeper = getpid();
    child_ = fork();
    if (child_ != 0) return;
    char told;
    if (read(ends_[0], &told, 1) == 1) sleep(seconds);
    // More than once: it may not have fallen asleep yet.
    for (; getppid() == sleeper; sleep(1)) kill(sleeper, SIGCONT);
    _exit(0);
  }
  void stop_this_process() {
    CHECK(write(ends_[1], "!", 1) == 1);
    kill(getpid(), SIGSTOP);
  }
  ~Waker() {
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }

 private:
  int ends_[2];
  pid_t child_;
};

// The clocks go on while a process is stopped; Metal's handlers do not.
void stopped_meanwhile() {
  Waker waker(5);
  note_waits();
  Hooks hooks = installed();
  hooks.set_gate_limit(4000);
  host::Ref queue = new_queue(), event = new_event(), skipped = new_event();
  fail_next();
  Work(new_queue()).waits(skipped, 1).commit();
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
  METALSIM(metalsim_hold_handlers)(1);
  fail_next();
  Work(queue).commit();
  Work(queue).signals(event, 1).commit();
  g_waiting = false;
  std::thread beginning([&] {
    hooks.mark_thread(1);
    new_event();  // waits for what the failed buffer did not wait for
    CHECK(value_of(skipped));
  });
  std::string said;
  std::thread waiting([&] {
    hooks.mark_thread(1);
    said = wait_for(event, 1);
  });
  while (!g_waiting) std::this_thread::yield();
  usleep(50'000);  // by now it is most likely held back
  waker.stop_this_process();
  usleep(200'000);
  set_value(skipped, 1);
  METALSIM(metalsim_hold_handlers)(0);
  beginning.join();
  waiting.join();
  CHECK(told_of_memory(said));
  CHECK(hooks.count().gate_limit == 0);
}

void reinstalled_clean() {
  Hooks hooks = installed();
  host::Ref queue = new_queue(), kept = new_event(), skipped = new_event();
  Work open(queue);
  {
    host::Ref event = new_event();
    fail_next();
    Work(queue).waits(skipped, 1).signals(event, 1).signals(kept, 1).commit();
    CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
    open.signals(event, 2);
    hooks.uninstall();
    CHECK(hooks.count().buffer_records == 0);
    CHECK(hooks.count().event_records == 0);
  }
  host::Ref event = new_event();  // most likely at the same address
  CHECK(install(hooks) == 0);
  Work(queue).signals(event, 1).commit();
  CHECK(wait_for(event, 1) == "reached");
  CHECK(wait_for(kept, 1) == "reached");
  check_protected(hooks);
  CHECK(hooks.count().gate_limit == 0);
}

void two_installs_at_once() {
  Hooks hooks = Hooks::open(g_hooks_path);
  for (int i = 0; i < 50; ++i) {
    std::thread a([&] { CHECK(hooks.install("observe") == 0); });
    std::thread b([&] { CHECK(hooks.install("intercept") == 0); });
    a.join();
    b.join();
    std::uint64_t before = hooks.epoch();
    host::Ref queue = new_queue(), event = new_event();
    fail_next();
    Work(queue).signals(event, 1).commit();
    wait_for(event, 1);
    CHECK(hooks.epoch() == before + 1);
    hooks.uninstall();
  }
}

// Where a case is the same in both regimes, or mixes them, it runs in one:
// - rounds, two_installs_at_once: install both in turn
// - stopped_meanwhile: takes 5 s, for one piece of code that both share
// - strange_exceptions, cpu_thread_told_late: handlers are wrapped, and CPU
//   threads' signals marked, in intercept only
// - observe_counts, signalled_in_handler: as MLX 0.32 alone does
struct Case {
  void (*run)();
  drive::In in;
};
using drive::kBoth;
using drive::kIntercept;
using drive::kObserve;
const std::map<std::string, Case> kCases = {
    {"no_device", {no_device, kBoth}},
    {"missing_selector", {missing_selector, kBoth}},
    {"missing_queue", {missing_queue, kBoth}},
    {"rootless", {rootless, kBoth}},
    {"replaced_before", {replaced_before, kBoth}},
    {"replaced_after", {replaced_after, kBoth}},
    {"twin", {twin, kBoth}},
    {"rounds", {rounds, kIntercept}},
    {"install_during_work", {install_during_work, kBoth}},
    {"uninstall_in_flight", {uninstall_in_flight, kBoth}},
    {"forked", {forked, kBoth}},
    {"debug_layer", {debug_layer, kBoth}},
    {"late_class", {late_class, kBoth}},
    {"address_reuse", {address_reuse, kBoth}},
    {"strange_exceptions", {strange_exceptions, kIntercept}},
    {"observe_counts", {observe_counts, kObserve}},
    {"signalled_in_handler", {signalled_in_handler, kObserve}},
    {"cpu_thread_told_late", {cpu_thread_told_late, kIntercept}},
    {"waited_event_dies", {waited_event_dies, kBoth}},
    {"counters", {counters, kBoth}},
    {"caller_has_less_time", {caller_has_less_time, kBoth}},
    {"handlers_never_run", {handlers_never_run, kBoth}},
    {"stopped_meanwhile", {stopped_meanwhile, kIntercept}},
    {"reinstalled_clean", {reinstalled_clean, kBoth}},
    {"two_installs_at_once", {two_installs_at_once, kIntercept}},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const auto& [name, one] : kCases) drive::list_case(name, one.in);
    return 0;
  }
  bool intercept = argc == 5 && std::strcmp(argv[4], "intercept") == 0;
  bool observe = argc == 5 && std::strcmp(argv[4], "observe") == 0;
  if (!(intercept || observe) || kCases.count(argv[1]) == 0) {
    std::fprintf(stderr,
                 "usage: surroundings CASE HOOKS TWIN intercept|observe\n"
                 "       surroundings --list\n");
    return 2;
  }
  alarm(300);
  g_hooks_path = argv[2];
  g_twin_path = argv[3];
  g_regime = intercept ? Regime::kIntercept : Regime::kObserve;
  kCases.at(argv[1]).run();
  // Not through static destructors: the device's threads go on.
  std::fflush(nullptr);
  _exit(0);
}
