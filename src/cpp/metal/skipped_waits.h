// Waits of failed buffers that the GPU left out (R13).
//
// R13 The GPU leaves out the waits of a failed buffer. Until their values come,
//     other queues or the CPU may still write to memory that MLX has let go of.
//     So Python's threads wait for these values before a wait returns, and
//     before the next evaluation begins (waiting.cpp).
//
// Any thread, Metal's included: a lock of its own, held for one pass over the
// list, and none to see that it is empty. Not for the crash path: it allocates.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "metal/ledger.h"

namespace mlx_safe::metal {

class SkippedWaits {
 public:
  void add(Id event, std::uint64_t value);
  std::vector<WaitRef> all();
  // Its value has come, or no thread waits for it any longer.
  void forget(const WaitRef& wait);
  void forget_all();
  // The one thread of a forked child; takes no lock, allocates nothing.
  void reset_after_fork() noexcept;

 private:
  std::mutex mutex_;
  std::vector<WaitRef> waits_;
  std::atomic<bool> any_{false};
};

}  // namespace mlx_safe::metal
