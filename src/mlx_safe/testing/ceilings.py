"""A GPU of a chosen size: `gpu_ceiling`."""

from __future__ import annotations

import threading

from ..memory.sizes import format_size, parse_size
from . import plans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["GPUCeiling", "gpu_ceiling"]

ENVIRONMENT = "MLX_SAFE_INJECT_CEILING"
OUT_OF_MEMORY = 8


class GPUCeiling:
    """What `gpu_ceiling` returns: a context manager that takes it back on exit.

    Attributes:
        size: bytes.
        steps: generation steps that were measured.
        peak: the most bytes that MLX held in one of them.
        struck: how many of them failed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps = self.peak = self.struck = 0

    def cancel(self) -> None:
        """Takes it back; more than once does no harm."""
        with _lock:
            if self in _ceilings:
                _ceilings.remove(self)

    def __enter__(self) -> GPUCeiling:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.cancel()
        if kind is None and not self.steps:
            raise plans.NeverFired(self.why_not())

    def why_not(self) -> str:
        """One line on a ceiling under which nothing was measured."""
        said = f"a ceiling of {format_size(self.size)}: no generation step was measured"
        if not plans.attached:
            said += "; no model is attached here: see mlx_safe.testing.attach"
        return said

    def _measure(self, peak: int) -> bool:
        if not self.steps:
            plans.log("measured", f"ceiling:{self.size}")
        self.steps += 1
        self.peak = max(self.peak, peak)
        self.struck += peak > self.size
        return peak > self.size


_lock = threading.Lock()
_ceilings: list[GPUCeiling] = []


def gpu_ceiling(size: int | str) -> GPUCeiling:
    """From now on a generation step that needs more memory than ``size`` fails.

    Each step of an attached model is evaluated at once and its peak is measured, with
    the weights and caches that are there. If it is above the ceiling, MLX's error for
    out of memory is raised. The program does not know the ceiling: it meets it, as it
    would the GPU's. MLX's peak counts from the start of the last step then.

    Args:
        size: bytes, or text such as ``"2G"`` (10^9) or ``"2GiB"``.

    Raises:
        ValueError: ``size`` is none.
    """
    found = GPUCeiling(parse_size(str(size)))
    with _lock:
        _ceilings.append(found)
    return found


def run(step: Callable[[], Any]) -> Any:
    """Calls ``step``, and fails as it would under the ceilings there are."""
    if not _ceilings:
        return step()
    import mlx.core as mx

    mx.reset_peak_memory()
    result = step()
    mx.eval(list(_arrays(result, mx.array)))
    peak = mx.get_peak_memory()
    with _lock:
        exceeded = [ceiling for ceiling in _ceilings if ceiling._measure(peak)]
    if exceeded:
        plans.log("fired", f"ceiling:{exceeded[0].size}")
        raise RuntimeError(plans.metal_message(OUT_OF_MEMORY))
    return result


def _arrays(result: Any, array: type) -> Iterator[Any]:
    """The arrays of what a model returns: one, several, or an object that has them."""
    if isinstance(result, array):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from _arrays(value, array)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _arrays(value, array)
    elif hasattr(result, "__dict__"):
        yield from (x for x in vars(result).values() if isinstance(x, array))
