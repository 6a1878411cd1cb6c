// The system's clock, thread ids and sleep, for code that may run anywhere.
//
// Everything declared here is async-signal-safe and may be called by any
// thread, Metal's included.
#pragma once

#include <signal.h>

#include <cstdint>

namespace mlx_safe {

// Nanoseconds since 1970.
std::int64_t now_ns() noexcept;

// The system's id of the calling thread: what debuggers and `sample` show.
std::uint64_t current_thread_id() noexcept;

// What Python calls the calling thread (threading.get_ident): its pthread_t.
std::uint64_t current_python_thread() noexcept;

// The id of the system, remembered: no system call but for a thread's first.
std::uint64_t remembered_thread_id() noexcept;
// The forked child's only thread has another id than its parent's.
void forget_thread_id() noexcept;

// Whether a process has sent the signal, and nothing that the thread did caused
// it. Then `si_pid` is set, and `si_addr` is not.
bool was_sent(const siginfo_t& info) noexcept;

// Whether `si_addr` is what was touched. Not where the signal was sent, nor
// where the processor does not say it (x86: an address that none can be).
bool has_address(const siginfo_t& info) noexcept;

void sleep_ms(long ms) noexcept;

}  // namespace mlx_safe
