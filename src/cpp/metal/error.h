// What a failed command buffer says of its failure.
#pragma once

#include "crash/breadcrumbs.h"
#include "crash/fault_log.h"
#include "objc/runtime.h"

namespace mlx_safe::metal {

// Begins every message of MLX about a failed command buffer (0.29 to 0.32).
inline constexpr char kMessagePrefix[] =
    "[METAL] Command buffer execution failed: ";

// The IOGPU code of an NSError: the code of the error under
// userInfo[NSUnderlyingErrorKey], else the number in the description. -1 when
// there is neither. Metal's threads; needs an autorelease pool.
std::int32_t code_of(objc::Id error) noexcept;

// Fills code, message, label and the GPU's times of a failed buffer. Metal's
// threads; needs an autorelease pool.
void describe(objc::Id buffer, objc::Id error, FaultRecord* fault) noexcept;

// What a report tells of a buffer that is done: all but whether it failed.
// Metal's threads; needs an autorelease pool.
CommandBufferRecord describe_done(objc::Id buffer,
                                  std::uint64_t number) noexcept;

}  // namespace mlx_safe::metal
