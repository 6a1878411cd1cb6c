// What all hooks share: the ledger, the counters, who may raise.
//
// Any thread, Metal's included, unless it is said below. Nothing here is for
// the crash path.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "metal/shared_ledger.h"
#include "metal/skipped_waits.h"

namespace mlx_safe::metal {

struct Counters {
  std::atomic<std::uint64_t> buffers{0}, completed{0}, failed{0}, swallowed{0},
      thrown{0}, gate_limit{0};
};
extern constinit Counters g_counters;

// How long a wait is held back at most: a handler that never runs must not
// make a wait hang (R19).
std::chrono::milliseconds gate_limit() noexcept;

// Neither is ever destroyed: Metal's threads may still complete buffers at
// exit.
SharedLedger& ledger();
SkippedWaits& skipped_waits();

// Whether any command buffer has failed in this process.
bool any_failed() noexcept;

// Sends signaledValue. Needs no autorelease pool.
std::uint64_t value_of(Id event);

// R18 Only Python's threads get an exception, which they surface as
//     RuntimeError. MLX's CPU stream threads, and Metal's, would end the
//     process: they are let go, and what they signal next is marked failed.
//
// Takes no GIL.
bool may_throw();

// Only where `may_throw()`, so never on Metal's threads.
[[noreturn]] void raise(const FailureRef& failure);

// R19 A handler that never runs must not make a wait hang: the wait is let go.
//     It is not known whether what it waited for is good, so it counts as
//     failed.
//
// Raises where `may_throw()`. Not on Metal's threads, which never wait.
void give_up_waiting();

}  // namespace mlx_safe::metal
