#include "crash/signals.h"

#include <signal.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

#include "crash/async_system.h"
#include "crash/recrash.h"
#include "crash/report.h"

namespace mlx_safe {
namespace {

struct Handled {
  int number;
  std::atomic<bool> in_chain{false};
  struct sigaction previous = {};
};
constinit Handled g_handled[] = {{SIGABRT}, {SIGSEGV}, {SIGBUS},
                                 {SIGILL},  {SIGFPE},  {SIGTRAP}};
constinit std::atomic<bool> g_active{false};

// Of signals that the process has survived. A handler in Python returns to the
// instruction that crashed, which crashes again, for ever: the disk must not
// fill.
constexpr int kSurvivedMax = 20;
constinit std::atomic<int> g_survived{0};

// What a report needs is below 16 KB; the signal's own frame is up to 11 KB
// where the processor has AMX, and the program's own handlers run here, too.
constexpr std::size_t kStackSize = 128 * 1024;
constexpr int kStacks = 16;
// Untouched, they take no memory. Never given back: another library may have
// remembered one as the stack to restore.
alignas(64) char g_stacks[kStacks][kStackSize];
constinit std::atomic<int> g_stacks_used{0};

Handled* handled(int number) noexcept {
  for (Handled& h : g_handled)
    if (h.number == number) return &h;
  return nullptr;
}

void write_body(void* argument) {
  write_report(*static_cast<const Event*>(argument), nullptr, 0);
}

void write_second(int number, const void* address, void* argument) {
  write_second_report(*static_cast<const Event*>(argument), number, address);
}

// The process dies as it would have without us. True when it may live on: a
// handler of its own has dealt with the signal. Async-signal-safe.
bool pass_on(Handled& h, siginfo_t* info, void* context) noexcept {
  const struct sigaction& previous = h.previous;
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(h.number, info, context);
    return true;
  }
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(h.number);
    return true;
  }
  ::sigaction(h.number, &previous, nullptr);
  // A fault of the processor comes again when the instruction is run again,
  // with the right stack for a debugger; what was sent is sent again. A trap on
  // x86 goes on behind its instruction.
  bool comes_again = h.number != SIGABRT && h.number != SIGTRAP;
  if (was_sent(*info) || !comes_again) ::raise(h.number);
  return false;
}

Event event_of(int number, const siginfo_t& info, void* context) noexcept {
  Event event;
  event.why = "signal";
  event.signal = number;
  if (was_sent(info)) {
    event.sender = info.si_pid;
  } else {
    event.address = info.si_addr;
  }
  event.address_known = has_address(info);
  event.signal_context = context;
  event.terminal = true;
  return event;
}

void report(Claim claim, Event event) noexcept {
  if (claim == Claim::kFirst) {
    run_guarded(&write_body, &write_second, &event);
    terminal_written();
  } else if (claim == Claim::kOtherThread && !wait_for_terminal()) {
    // The other one hangs, in what() of an exception, say.
    write_second_report(event, event.signal, event.address);
  }
}

void on_signal(int number, siginfo_t* info, void* context) {
  int saved_errno = errno;
  Handled* h = handled(number);
  if (g_active.load() && g_survived.load() < kSurvivedMax) {
    Claim claim = claim_terminal();
    report(claim, event_of(number, *info, context));
    errno = saved_errno;
    // Where the process lives on, its next crash is another one.
    if (pass_on(*h, info, context) && claim == Claim::kFirst) {
      g_survived.fetch_add(1);
      release_terminal();
    }
  } else {
    pass_on(*h, info, context);
  }
  errno = saved_errno;
}

// Was reset to the default by SA_RESETHAND, and is blocked until it returns.
void on_stop(int number) {
  int saved_errno = errno;
  stopped_in_order();
  ::raise(number);
  errno = saved_errno;
}

bool is_default(const struct sigaction& action) noexcept {
  return (action.sa_flags & SA_SIGINFO) == 0 && action.sa_handler == SIG_DFL;
}

bool is_ours(const struct sigaction& action) noexcept {
  return (action.sa_flags & SA_SIGINFO) != 0 &&
         action.sa_sigaction == &on_signal;
}

}  // namespace

void signals_install() noexcept {
  signals_cover_this_thread();
  struct sigaction ours = {};
  ours.sa_sigaction = &on_signal;
  // Not deferred: what a handler further down raises must end the process.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  for (Handled& h : g_handled) {
    struct sigaction now = {};
    if (::sigaction(h.number, nullptr, &now) != 0) continue;
    // By default this handler is not below it: what was on top took it out.
    if (h.in_chain.load() && !is_default(now)) continue;
    if ((now.sa_flags & SA_SIGINFO) == 0 && now.sa_handler == SIG_IGN) continue;
    h.previous = now;
    if (::sigaction(h.number, &ours, nullptr) == 0) h.in_chain.store(true);
  }
  g_active.store(true);
}

void signals_uninstall() noexcept {
  g_active.store(false);
  for (Handled& h : g_handled) {
    struct sigaction now = {};
    if (!h.in_chain.load() || ::sigaction(h.number, nullptr, &now) != 0)
      continue;
    if (!is_ours(now)) continue;  // another library's is on top
    ::sigaction(h.number, &h.previous, nullptr);
    h.in_chain.store(false);
  }
}

bool signals_installed() noexcept {
  if (!g_active.load()) return false;
  for (Handled& h : g_handled) {
    struct sigaction now = {};
    if (h.in_chain.load() && ::sigaction(h.number, nullptr, &now) == 0 &&
        is_default(now))
      return false;
  }
  return true;
}

bool signal_is_default(int number) noexcept {
  struct sigaction now = {};
  return ::sigaction(number, nullptr, &now) == 0 && is_default(now);
}

void stop_install(int number) noexcept {
  struct sigaction ours = {};
  ours.sa_handler = &on_stop;
  ours.sa_flags = static_cast<int>(SA_RESETHAND) | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  ::sigaction(number, &ours, nullptr);
}

void stop_uninstall(int number) noexcept {
  struct sigaction now = {};
  if (::sigaction(number, nullptr, &now) != 0 ||
      (now.sa_flags & SA_SIGINFO) != 0 || now.sa_handler != &on_stop)
    return;
  struct sigaction none = {};
  none.sa_handler = SIG_DFL;
  ::sigaction(number, &none, nullptr);
}

bool signals_cover_this_thread() noexcept {
  stack_t now = {};
  if (::sigaltstack(nullptr, &now) != 0) return false;
  if ((now.ss_flags & SS_DISABLE) == 0 && now.ss_size >= kStackSize)
    return true;
  int mine = g_stacks_used.fetch_add(1);
  if (mine >= kStacks) {
    g_stacks_used.store(kStacks);
    return false;
  }
  stack_t stack = {};
  stack.ss_sp = g_stacks[mine];
  stack.ss_size = kStackSize;
  return ::sigaltstack(&stack, nullptr) == 0;
}

KeptSignals::KeptSignals() noexcept {
  for (int n = 1; n < kCount; ++n) ::sigaction(n, nullptr, &actions_[n]);
}

void KeptSignals::put_back() const noexcept {
  for (int n = 1; n < kCount; ++n) {
    const struct sigaction& was = actions_[n];
    struct sigaction now = {};
    if (is_default(was) && handled(n) == nullptr) continue;
    // sa_handler and sa_sigaction share their memory.
    if (::sigaction(n, nullptr, &now) != 0 ||
        now.sa_sigaction == was.sa_sigaction)
      continue;
    ::sigaction(n, &was, nullptr);
  }
}

}  // namespace mlx_safe
