// The hooks, for those who install them. What is replaced in Metal's classes is
// the list in hook_list.cpp. Nothing here is for the crash path.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace mlx_safe::metal {

enum class Mode { kIntercept, kObserve };

struct HookStatus {
  bool active = false;
  bool verified = false;
  std::string runtime;               // path of the Objective-C runtime
  std::vector<std::string> hooked;   // "-[Class selector]"
  std::vector<std::string> reasons;  // why not, one line each
};

struct HookCounters {
  std::uint64_t buffers;    // committed since the first install
  std::uint64_t completed;  // of them, those whose handlers have run
  std::uint64_t failed;     // of them, those with status error
  std::uint64_t swallowed;  // exceptions kept from std::terminate
  std::uint64_t thrown;     // waits that raised
  // Waits let go although handlers had not run, with a fault in the log for
  // each, or although work went on that a failed buffer was to wait for.
  std::uint64_t gate_limit;
  std::uint64_t buffer_records, event_records;
};

// Hooks Metal, or changes the mode. Idempotent, serialised by a lock, not for
// Metal's threads. When it does not come to verified hooks, they are taken out
// again and `reasons` says why.
HookStatus install(Mode mode);

// Restores the original methods. A method that another library has replaced
// since stays as it is; our part of its chain only passes on.
void uninstall();

// Any thread but Metal's; take the lock of the installation, or the ledger's.
HookStatus status();
HookCounters counters();

// Waits (10 s at most) for the work that failed buffers should have waited for:
// it may still be writing to memory that MLX has let go of. On Python's threads
// only, without the GIL; elsewhere it does nothing.
void wait_for_skipped();

// Lets waits on this thread raise in a process without Python. With Python, the
// threads that it knows may raise, and no others (R18). Any thread, for itself.
void this_thread_may_throw(bool may);

// How long a wait is held back for handlers that do not run (R19); for tests.
// Any thread.
void set_gate_limit(std::chrono::milliseconds limit);

// The one thread of a forked child.
void after_fork_in_child() noexcept;

}  // namespace mlx_safe::metal
