"""A real out-of-memory of the GPU: more memory than it has, in one command buffer.

Only for a Mac, and not for one that somebody works on: it takes all that the GPU
may use.
"""

from __future__ import annotations

# Before mlx is imported: otherwise MLX splits the work into many buffers, and
# each of them alone would fit.
ENVIRONMENT = {"MLX_MAX_OPS_PER_BUFFER": "100000", "MLX_MAX_MB_PER_BUFFER": "10000000"}


def hog(times: float = 3.0) -> object:
    """Arrays of ``times`` the memory the GPU can use at once, not yet evaluated.

    A list of mx.array; evaluating it must fail. Not thread-safe: it sets MLX's
    memory limit, since MLX would wait for memory, or refuse, before the GPU does.
    """
    import mlx.core as mx

    device_info = getattr(mx, "device_info", None) or mx.metal.device_info
    info = device_info()
    limit = int(info["max_recommended_working_set_size"])
    # 4 GiB: a dimension is a 32-bit number.
    one = min(int(info["max_buffer_length"]) // 2, limit // 8, 4 << 30)
    mx.set_memory_limit(int(limit * times * 4))
    count = int(limit * times / one) + 1
    # Filled on the GPU, each with its own value, so that none can be shared.
    return [mx.full((one // 4,), float(i + 1), mx.float32) for i in range(count)]
