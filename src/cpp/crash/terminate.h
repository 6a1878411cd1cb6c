// The last resort: a std::terminate handler. It writes a report (report.h).
//
// MLX up to 0.31.2 throws inside Metal's completion handler and on its CPU
// stream threads; where no hook caught that, the C++ runtime ends up here.
#pragma once

namespace mlx_safe {

enum class TerminatePolicy {
  // Write the report, then call the handler that was there before. The process
  // dies as it would have died.
  kReport,
  // Write the report, wake the reader of the fault log's descriptor, park this
  // thread until `terminate_drained` is called or the time is up, and exit with
  // status 75 (EX_TEMPFAIL). A server answers its clients meanwhile.
  kDrain,
};

inline constexpr int kDrainedExitStatus = 75;

struct TerminateOptions {
  TerminatePolicy policy = TerminatePolicy::kReport;
  double drain_seconds = 10.0;
  // Python's PyGILState_Check and PyEval_SaveThread, or null. A thread that
  // terminates while it holds the GIL would stop the very threads that are to
  // answer the clients.
  int (*holds_gil)() = nullptr;
  void* (*release_gil)() = nullptr;
};

// Installs the handler, or changes the options of the one that is installed.
// Any thread; not for the crash path.
void terminate_install(const TerminateOptions& options) noexcept;

// Puts the previous handler back. Where another library has installed its own
// on top meanwhile, ours stays in the chain and only passes on.
void terminate_uninstall() noexcept;

bool terminate_installed() noexcept;

// True once an exception has reached the handler under kDrain: the process can
// only be replaced. Any thread.
bool terminate_reached() noexcept;

// Adds to the number of those who answer clients when the handler is reached
// under kDrain. With nobody, the process leaves at once: a thread that is
// parked for nobody only keeps the clients waiting. Any thread.
void terminate_drainers(int more) noexcept;

// Waits until the report of what has reached the handler is whole, for 5 s at
// most: it names who is in flight, so nobody is answered before. Any thread.
void terminate_reported() noexcept;

// Tells the parked thread that the clients have their answers; it exits the
// process with status 75. Any thread.
void terminate_drained() noexcept;

// A forked child has no thread that would drain it: back to kReport.
void terminate_after_fork_in_child() noexcept;

}  // namespace mlx_safe
