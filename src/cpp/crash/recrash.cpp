#include "crash/recrash.h"

#include <setjmp.h>
#include <signal.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crash/async_system.h"

namespace mlx_safe {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP};
constexpr std::size_t kCount = sizeof kSignals / sizeof *kSignals;
constexpr int kWaitLimitMs = 5'000;

struct Guard {
  std::atomic<std::uint64_t> thread{0};  // that is in the body; 0: nobody
  bool crashed = false;
  void (*on_crash)(int, const void*, void*) = nullptr;
  void* argument = nullptr;
  sigjmp_buf back = {};
  struct sigaction before[kCount] = {};
};
constinit Guard g_guard;

void put_back(std::size_t i) noexcept {
  ::sigaction(kSignals[i], &g_guard.before[i], nullptr);
}

// Of a thread that is not in the body. What crashed does so again afterwards,
// under the handlers that are back.
void wait_for_body(int number, const siginfo_t& info) noexcept {
  for (int ms = 0; ms < kWaitLimitMs && g_guard.thread.load() != 0; ms += 10)
    sleep_ms(10);
  // The body hangs. It must not keep the process from dying.
  if (g_guard.thread.load() != 0)
    for (std::size_t i = 0; i < kCount; ++i)
      if (kSignals[i] == number) put_back(i);
  if (was_sent(info) || number == SIGTRAP) ::raise(number);
}

void on_signal(int number, siginfo_t* info, void*) {
  if (g_guard.thread.load() != current_thread_id())
    return wait_for_body(number, *info);
  // A crash of `on_crash` itself only ends it.
  if (!g_guard.crashed) {
    g_guard.crashed = true;
    g_guard.on_crash(number, was_sent(*info) ? nullptr : info->si_addr,
                     g_guard.argument);
  }
  ::siglongjmp(g_guard.back, 1);
}

}  // namespace

bool run_guarded(void (*body)(void*), void (*on_crash)(int, const void*, void*),
                 void* argument) noexcept {
  g_guard.crashed = false;
  g_guard.on_crash = on_crash;
  g_guard.argument = argument;
  g_guard.thread.store(current_thread_id());
  struct sigaction ours = {};
  ours.sa_sigaction = &on_signal;
  // Without SA_NODEFER the system kills a process that crashes in a handler.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  if (sigsetjmp(g_guard.back, 1) == 0) {
    for (std::size_t i = 0; i < kCount; ++i)
      ::sigaction(kSignals[i], &ours, &g_guard.before[i]);
    body(argument);
  }
  for (std::size_t i = 0; i < kCount; ++i) put_back(i);
  g_guard.thread.store(0);
  return !g_guard.crashed;
}

bool run_part(void (*body)(void*), void* argument) noexcept {
  if (g_guard.thread.load() != current_thread_id()) {
    body(argument);
    return true;
  }
  sigjmp_buf outer;
  std::memcpy(&outer, &g_guard.back, sizeof outer);
  auto on_crash = g_guard.on_crash;
  g_guard.on_crash = [](int, const void*, void*) {};
  // Not a variable of ours that changes: it might be lost in the jump.
  if (sigsetjmp(g_guard.back, 1) == 0) body(argument);
  bool good = !g_guard.crashed;
  g_guard.crashed = false;
  g_guard.on_crash = on_crash;
  std::memcpy(&g_guard.back, &outer, sizeof outer);
  return good;
}

}  // namespace mlx_safe
