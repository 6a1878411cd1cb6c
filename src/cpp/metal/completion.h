// The completion handlers: the one that the hooks add, and MLX's, wrapped.
//
// MLX 0.31.2 throws in its handlers. Each of them is wrapped in a Block that
// calls it inside try and catch. It is called whatever happens, it sees the
// truth, and nothing that it throws gets out. docs/metal.md tells why not
// otherwise, and what it costs.
#pragma once

#include <cstdint>

#include "metal/hook_functions.h"

namespace mlx_safe::metal {

// Adds the last handler of a buffer, `number` since the first install. The
// thread that commits it, right before; the ledger knows the buffer.
void add_last_handler(Id buffer, std::uint64_t number);

// Calls `original` with `block`, wrapped. Any thread.
void add_wrapped(Original<void, const void*> original, Id buffer,
                 Selector selector, const void* block);

// R11: whether to set `event` to `value` would lower it. Any thread, Metal's
// included; waits a millisecond at most.
bool would_lower(Id event, std::uint64_t value);

}  // namespace mlx_safe::metal
