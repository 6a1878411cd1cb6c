"""Faults of the simulated Metal, for programs of the tests that run on it.

Python's library alone is needed: it may be imported before mlx_safe is.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["fail_next", "sim"]

sim = ctypes.CDLL(os.environ["MLX_SAFE_METAL_RUNTIME"])
sim.metalsim_plan_fail.argtypes = [
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_uint32,
]


def fail_next(code: int = 8, late_us: int = 0) -> None:
    """The next command buffer fails, ``late_us`` microseconds late."""
    sim.metalsim_plan_fail(1, code, 0, late_us)
