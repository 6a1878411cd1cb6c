// What mlx_safe.testing calls. Triggers that only our own tests need are in
// tests/native.
#pragma once

#include <cstdint>
#include <string>

namespace mlx_safe {

// Records a fault from a thread of its own, as a completion handler would when
// MLX swallows the error; returns when it is in the log.
std::uint64_t testing_record_fault(std::int32_t code,
                                   const std::string& message);

// Throws std::runtime_error(message) on a thread that is not joined and where
// nothing catches, as MLX 0.31.2 does on Metal's completion thread.
void testing_throw_on_foreign_thread(const std::string& message);

// Runs one empty command buffer on the real (or simulated) device as MLX does
// in the regime that is installed, with an event that is waited for. When the
// buffer has failed, its completion handler stores the error for the waiter to
// raise (observe, MLX 0.32) or throws it (otherwise, MLX 0.31.2). Throws
// std::runtime_error for a failure, or when there is no Metal. Not for Metal's
// threads.
void testing_run_command_buffer();

}  // namespace mlx_safe
