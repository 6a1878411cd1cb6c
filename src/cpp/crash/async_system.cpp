#include "crash/async_system.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
// Laid out with the thread itself: the other models may allocate at first use.
#define MLX_SAFE_TLS __attribute__((tls_model("initial-exec")))
#else
#define MLX_SAFE_TLS
#endif

namespace mlx_safe {
namespace {

constinit thread_local std::uint64_t t_id MLX_SAFE_TLS = 0;

}  // namespace

std::int64_t now_ns() noexcept {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

std::uint64_t current_thread_id() noexcept {
#if defined(__APPLE__)
  std::uint64_t id = 0;
  ::pthread_threadid_np(nullptr, &id);
  return id;
#else
  return static_cast<std::uint64_t>(::syscall(SYS_gettid));
#endif
}

std::uint64_t current_python_thread() noexcept {
  // A number on Linux, a pointer on macOS.
  return (std::uint64_t)::pthread_self();
}

std::uint64_t remembered_thread_id() noexcept {
  if (t_id == 0) t_id = current_thread_id();
  return t_id;
}

void forget_thread_id() noexcept { t_id = 0; }

bool was_sent(const siginfo_t& info) noexcept {
  return info.si_code <= 0 || info.si_code == SI_USER;  // 0x10001 on macOS
}

bool has_address(const siginfo_t& info) noexcept {
#if defined(__linux__)
  if (info.si_code == SI_KERNEL) return false;
#endif
  // macOS does not say who has aborted: it need not look sent.
  return !was_sent(info) && info.si_signo != SIGABRT;
}

void sleep_ms(long ms) noexcept {
  timespec t{ms / 1000, (ms % 1000) * 1'000'000};
  ::nanosleep(&t, nullptr);
}

}  // namespace mlx_safe
