// A crash while a report is written must not change how the process dies.
#pragma once

namespace mlx_safe {

// Runs `body(argument)`. A SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT or SIGTRAP
// of this thread meanwhile calls `on_crash(number, address, argument)` and ends
// the body; false then. Objects of the body are not destroyed: it must own none
// that matter. A crash of another thread waits until the body is done, 5 s at
// most, then goes where it would have gone. The handlers that were there are
// back afterwards. Async-signal-safe; one thread at a time, which
// `claim_terminal` sees to.
bool run_guarded(void (*body)(void*),
                 void (*on_crash)(int number, const void* address,
                                  void* argument),
                 void* argument) noexcept;

// Inside such a body: runs `body(argument)`, whose crash ends only itself;
// false then. Elsewhere, just runs it. Async-signal-safe.
bool run_part(void (*body)(void*), void* argument) noexcept;

}  // namespace mlx_safe
