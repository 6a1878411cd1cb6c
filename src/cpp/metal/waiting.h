// Waits that need more than Metal's own: for work whose wait the GPU left out
// (R13), and those that MLX would wait in for ever (R14 to R17).
//
// None of them is for Metal's threads or for the crash path: they wait, send
// messages and take the ledger's lock.
#pragma once

#include <chrono>
#include <cstdint>

#include "metal/hook_functions.h"
#include "metal/ledger.h"

namespace mlx_safe::metal {

// R13, on Python's threads; elsewhere nothing. With less time than the gate's
// limit, as a caller of a wait may have, what is left is for the next one.
void await_skipped(std::chrono::milliseconds limit);

// R14: returns when `waited_for` has settled, or when this thread has no open
// signal any more.
void let_go_of_own_signals(const BufferRef& waited_for);

// R15 to R17: waits with `original`, on a thread that may not raise, for as
// long as it takes.
bool wait_on_cpu_stream(Original<bool, std::uint64_t, std::uint64_t> original,
                        Id event, Selector selector, std::uint64_t value);

}  // namespace mlx_safe::metal
