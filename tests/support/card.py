"""What a CUDA card does otherwise than MLX's CPU backend, in the suites of both.

`docs/hardware.md` says how they are run on one.
"""

from __future__ import annotations

import functools
import os


def round_alike() -> None:
    """For all Pythons that the tests start, before MLX is imported.

    With TF32, which MLX takes for float32 on a card, a text differs with what is
    computed beside it.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


@functools.cache
def is_card() -> bool:
    """Whether MLX computes on a CUDA card here."""
    import mlx.core as mx

    # Only CUDA's has it; `mx.device_info` is new in 0.31.
    read = getattr(mx, "device_info", None)
    return read is not None and "free_memory" in read()
