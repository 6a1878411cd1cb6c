"""A simulated Metal for Linux, and how to make its command buffers fail.

mlx_safe hooks the Metal that ``MLX_SAFE_METAL_RUNTIME`` names when it installs itself:
start a program with `environment`, or use the fixture ``simulated_metal`` of mlx_safe's
pytest plugin. Thread-safe.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SimulatedMetal", "environment", "library", "load"]

VARIABLE = "MLX_SAFE_METAL_RUNTIME"


def library() -> str:
    """The path of the library.

    Raises:
        FileNotFoundError: this is an installation without it, as from another system.
    """
    path = Path(__file__).resolve().parent / "libmetalsim.so"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: it is built for Linux")
    return str(path)


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """``base``, by default this process's environment, for a program on the library."""
    return {**(os.environ if base is None else base), VARIABLE: library()}


class _Totals(ctypes.Structure):
    """``metalsim_totals``."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("buffers_created", "buffers_committed", "buffers_completed"),
            *("buffers_failed", "handlers_added", "handlers_called"),
            *("handlers_released", "handlers_dropped", "order_violations"),
            *("signals_encoded", "signals_done", "signals_withheld"),
            *("waits_encoded", "waits_done", "waits_skipped"),
            *("kernels_run", "kernels_skipped", "blocks_copied", "blocks_disposed"),
        )
    ]


class SimulatedMetal:
    """The library, loaded into this process. Use `load`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.metalsim_plan_fail.argtypes = (
            *(ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint32),
        )
        self._library.metalsim_set_memory.argtypes = (
            *(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64),
        )

    def fail(
        self, nth: int = 1, code: int = 8, *, persistent: bool = False, late_us: int = 0
    ) -> None:
        """Lets the ``nth`` command buffer from now fail; instead of what was planned.

        Args:
            nth: 1 is the next that is committed.
            code: IOGPU code, such as 8 (out of memory) or 2 (timeout).
            persistent: all that follow fail as well.
            late_us: its completion handlers come so late, in microseconds.
        """
        self._library.metalsim_plan_fail(nth, code, persistent, late_us)

    def set_memory(self, ceiling: int) -> None:
        """Buffers of more than ``ceiling`` bytes in all fail with code 8; 0: never."""
        self._library.metalsim_set_memory(int(ceiling > 0), ceiling, ceiling)

    @property
    def totals(self) -> dict[str, int]:
        """Counts since the start or `reset`: ``buffers_failed``, and others."""
        found = _Totals()
        self._library.metalsim_get_totals(ctypes.byref(found))
        return {str(name): int(getattr(found, name)) for name, *_ in found._fields_}

    def reset(self) -> bool:
        """Waits until nothing is in flight, at most 100 s; forgets plans and counts.

        Returns:
            whether nothing was in flight.
        """
        return bool(self._library.metalsim_reset() == 0)


@functools.cache
def load(path: str | None = None) -> SimulatedMetal:
    """The library in this process; ``path``: another one than `library`'s."""
    return SimulatedMetal(library() if path is None else path)
