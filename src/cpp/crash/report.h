// The one writer of crash reports and of the run file.
//
// The same code writes in the crash path (terminate, signals) and on ordinary
// threads (faults, stalls). The format: docs/reports.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_safe {

// Bytes of the directory's path; a longer one is as none.
inline constexpr std::size_t kDirectoryMax = 1023;

// Prepares the crash path: the directory (null or empty: no reports), the files
// that are made there beforehand, the unwinder. Returns the descriptor of a
// file without a name, for Python's stacks on their way into a report; -1:
// none. Callable again; the descriptor stays the same as long as it is ours.
// Not for the crash path; one thread at a time.
int report_prepare(const char* directory, const char* argv0) noexcept;
// What writes the Python stacks of all threads to that descriptor.
using PythonStacks = void (*)();
void report_set_python_stacks(PythonStacks python_stacks) noexcept;
// No report is written from now on.
void report_stop() noexcept;

struct Event {
  const char* why = "";
  std::int64_t time_ns = 0;  // 0: now
  int signal = 0;            // 0: none
  std::int64_t sender = 0;   // process that sent the signal; 0: none did
  const void* address = nullptr;
  bool address_known = true;
  const void* signal_context = nullptr;  // third argument of a signal handler
  const char* exception_type = nullptr;
  const char* exception_message = nullptr;
  bool has_code = false;
  std::int32_t code = -1;
  const char* policy = nullptr;
  // Of an ordinary thread, which has asked Python already; null: none.
  const char* python_stacks = nullptr;
  // The process is about to die: native and Python stacks are walked, and the
  // run file goes.
  bool terminal = false;
};

// Writes a report in sections. False when it is not there or not whole. The
// path (if `path` is not null) is that of the file, "" if there is none.
// Async-signal-safe apart from the walking of stacks, see native_stack.h: a
// terminal one is written inside `run_guarded`. Any thread but Metal's.
bool write_report(const Event& event, char* path,
                  std::size_t capacity) noexcept;

// The minimal second report of a crash inside the writer. Async-signal-safe.
void write_second_report(const Event& event, int number,
                         const void* address) noexcept;

// What a process that is killed leaves behind: run-<pid>.json, with the context
// and the last memory figures. Rewritten by a rename. False when it cannot be
// written, or another thread is at it. Nothing is written once a report tells
// of the death. Not for the crash path.
bool write_run_file() noexcept;
// Async-signal-safe. Only that of this process, not of its parent.
void remove_run_file() noexcept;
// The process ends on request: there is no death to report, and no run file
// from now on. Async-signal-safe.
void stopped_in_order() noexcept;

struct ReportCounts {
  std::uint64_t written, failed;
};
// Since the process started. Any thread.
ReportCounts report_counts() noexcept;

// ---- who may write the terminal report -------------------------------------

enum class Claim { kFirst, kSameThread, kOtherThread };

// The first thread that dies writes; it is the same one for `std::terminate`
// and for the SIGABRT that follows. Async-signal-safe.
Claim claim_terminal() noexcept;
// It has written: others need not wait any longer.
void terminal_written() noexcept;
// Waits until then, at most five seconds; false: the writer hangs.
// Async-signal-safe.
bool wait_for_terminal() noexcept;
// The process lives on after all (a handler of the program's own took it).
void release_terminal() noexcept;

void report_after_fork_in_child() noexcept;

}  // namespace mlx_safe
