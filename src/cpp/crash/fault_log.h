// The fault log: what failed on the GPU, in the order it was noticed.
//
// A fixed ring in static storage. Writers are Metal's completion threads and
// the terminate handler, so writing takes no lock, allocates nothing and never
// waits. A reader (a Python thread) may wait a moment for a writer that has
// claimed its place but not yet filled it.
//
// The epoch is the number of faults claimed so far. It grows when a place is
// claimed, before the record is readable: a thread that sees that the epoch has
// not moved knows that there was no fault.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "crash/ring.h"

namespace mlx_safe {

enum class FaultSource : std::int32_t {
  kMetal = 0,      // a command buffer completed with status error
  kTerminate = 1,  // an exception reached std::terminate
  kInjected = 2,   // mlx_safe.testing
};

struct FaultRecord {
  std::uint64_t number;  // its place in the epoch count, from 1
  std::uint64_t buffer;  // command buffers since install; 0: not known
  std::uint64_t queue;   // address of the command queue; 0: not known
  std::uint64_t thread;  // system id of the thread that noticed it
  std::int64_t time_ns;  // since 1970
  double gpu_start_s;    // GPUStartTime, GPUEndTime (CFTimeInterval);
  double gpu_end_s;      // 0: not known
  std::int32_t code;     // IOGPU code; -1: none could be read
  std::int32_t source;   // FaultSource
  char label[64];        // label of the command buffer
  char message[360];     // as MLX words it
};

class FaultLog {
 public:
  static constexpr std::size_t kCapacity = 256;

  // Fills in `number`, and `thread` and `time_ns` where they are 0, and stores
  // the record. Returns the number. Async-signal-safe; any thread.
  std::uint64_t record(FaultRecord fault) noexcept;

  // Faults since the process started. Async-signal-safe; any thread.
  std::uint64_t epoch() const noexcept { return ring_.claimed(); }

  // Reads fault `number`. kPending: claimed, its writer is still writing.
  // kLost: overwritten by a later one, or dropped. Any thread.
  ReadResult read(std::uint64_t number, FaultRecord* out) const noexcept {
    return ring_.read(number, out);
  }

  // Those that can be read, oldest first. Async-signal-safe; any thread.
  template <class Use>
  void each(Use use) const noexcept {
    ring_.each(use);
  }

  // Records that could not be stored because a writer 256 faults earlier had
  // not finished. Any thread.
  std::uint64_t dropped() const noexcept { return ring_.dropped(); }

  // A descriptor that becomes readable when a fault is recorded; opened by the
  // first call. -1 and errno when there is none to be had. Not for the crash
  // path.
  int notify_fd() noexcept;
  // Empties the descriptor. Any thread.
  void drain_notifications() noexcept;
  // Makes the descriptor readable. Async-signal-safe; any thread.
  void notify() noexcept;
  // The child must not share its parent's pipe.
  void after_fork_in_child() noexcept;

 private:
  std::atomic<int> read_fd_{-1};
  std::atomic<int> write_fd_{-1};
  Ring<FaultRecord, kCapacity> ring_;
};

// The one log of this process. In static storage and never destroyed: Metal's
// threads may still fail buffers while the process exits.
FaultLog& fault_log() noexcept;

// The IOGPU code in a message such as "Insufficient Memory (00000008:kIOGPU…)"
// or "Internal Error (0000000e)": eight hex digits after a bracket, since the
// wording differs between systems and drivers. -1 when there is none below
// 2^31. Async-signal-safe.
std::int32_t code_in_message(const char* message) noexcept;

}  // namespace mlx_safe
