// Reports for signals that end the process: SIGABRT, SIGSEGV, SIGBUS, SIGILL,
// SIGFPE and SIGTRAP, which on arm64 is what `__builtin_trap` raises: failed
// checks of libdispatch and of Swift end so.
#pragma once

namespace mlx_safe {

// Handlers that write a report and go on to the ones that were there before, or
// let the signal do what it would have done. A signal that is ignored is left
// alone. The calling thread gets an alternate stack. Idempotent, and takes back
// what somebody has set to the default meanwhile; one thread at a time; not for
// the crash path.
void signals_install() noexcept;

// Puts the previous handlers back. Where another library has installed its own
// on top meanwhile, ours stays below it and only passes on.
void signals_uninstall() noexcept;

// False, too, when one of them was set to the default since. Not for the crash
// path.
bool signals_installed() noexcept;

// Gives the calling thread an alternate stack, so that running out of the
// ordinary one leaves a report, too. There are 16 for the whole process; false
// when they are used up. Threads keep theirs: for threads that live long. Not
// for the crash path.
bool signals_cover_this_thread() noexcept;

}  // namespace mlx_safe
