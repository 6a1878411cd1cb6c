"""A real out-of-memory of the GPU: more memory than it has, in one evaluation.

Not for a machine that somebody works on: it takes all that the GPU may use.
"""

from __future__ import annotations

# Before mlx is imported: otherwise MLX splits the work into many buffers, and
# each of them alone would fit.
ENVIRONMENT = {"MLX_MAX_OPS_PER_BUFFER": "100000", "MLX_MAX_MB_PER_BUFFER": "10000000"}


def hog(times: float = 3.0) -> object:
    """Arrays of more memory than the GPU has, not yet evaluated.

    On a Mac of ``times`` what it can use at once, in one command buffer.

    A list of mx.array; evaluating it must fail. Not thread-safe: it sets MLX's
    memory limit, since MLX would wait for memory, or refuse, before the GPU does.
    """
    import mlx.core as mx

    device_info = getattr(mx, "device_info", None) or mx.metal.device_info
    info = device_info()
    if "free_memory" in info:  # a CUDA card: all that is free, and 4 GiB more
        count = int(info["free_memory"]) // 2**30 + 4
        return [mx.zeros((1024, 2**19), mx.float16) + i for i in range(count)]
    limit = int(info["max_recommended_working_set_size"])
    # 4 GiB: a dimension is a 32-bit number.
    one = min(int(info["max_buffer_length"]) // 2, limit // 8, 4 << 30)
    mx.set_memory_limit(int(limit * times * 4))
    count = int(limit * times / one) + 1
    # Filled on the GPU, each with its own value, so that none can be shared.
    return [mx.full((one // 4,), float(i + 1), mx.float32) for i in range(count)]
