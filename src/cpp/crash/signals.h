// Reports for signals that end the process.
//
// SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGTRAP, which on arm64 is what
// `__builtin_trap` raises: failed checks of libdispatch and of Swift end so.
#pragma once

#include <signal.h>

namespace mlx_safe {

// Handlers that write a report and go on to the ones that were there before, or
// let the signal do what it would have done. A signal that is ignored is left
// alone. The calling thread gets an alternate stack. Idempotent, and takes back
// what was set to the default meanwhile; one thread at a time; not for
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

// Whether the signal does what it does by default. Any thread.
bool signal_is_default(int number) noexcept;

// From now on a signal that ends the process, such as SIGTERM, takes the run
// file along: an orderly stop is no death. The process ends by it as it would
// have, also while it computes. Idempotent; one thread at a time; not for the
// crash path.
void stop_install(int number) noexcept;

// Puts the default back where the handler is still ours.
void stop_uninstall(int number) noexcept;

// Who has which signal at a moment, to be put back when another library has
// taken some. One thread at a time; not for the crash path.
class KeptSignals {
 public:
  KeptSignals() noexcept;

  // Gives the signals that were anybody's, and are another's now, back to him.
  // Those of a crash also where they were nobody's: a handler that was there
  // before ours may let the process live on.
  void put_back() const noexcept;

 private:
  static constexpr int kCount = 32;  // without those of real time
  struct sigaction actions_[kCount] = {};
};

}  // namespace mlx_safe
