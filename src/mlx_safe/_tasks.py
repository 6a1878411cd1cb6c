"""Which named guards a fault may belong to.

A command buffer belongs to every guard that was open when it was committed. MLX is
lazy: that is where its work was waited for, or submitted by ``mx.async_eval``, and not
where it was written down. Without hooks a fault has no command buffer, and its
time decides. Guards that were open side by side are all named: a buffer does not
say which thread or asyncio task it is of. All of this may be used from any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

from . import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextvars import ContextVar
    from typing import Final

__all__ = ["Task", "in_this_context", "names_of"]

# Guards that have ended and are remembered: MLX may report a fault after them.
ENDED_MAX = 1024

_lock = threading.Lock()
_open: dict[Task, None] = {}
_ended: deque[Task] = deque(maxlen=ENDED_MAX)
_numbers = itertools.count()
# Made by the first guard that has a name: the import takes a fifth of a millisecond.
_names: ContextVar[tuple[str, ...]] | None = None


class Task:
    """One block of a named guard, from when it is made to `end`."""

    __slots__ = (
        "_before",
        "_began",
        "_ended",
        "_first",
        "_last",
        "_names",
        "_number",
        "name",
    )

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self._number = next(_numbers)
        self._names = _names_here()
        self._before = self._names.get()
        self._names.set((*self._before, name))
        self._began = time.time()
        self._ended = float("inf")
        # The last command buffer before it, and the last in it.
        self._first = _buffers()
        self._last: float = float("inf")
        with _lock:
            _open[self] = None

    def end(self) -> None:
        """The block has ended, and what it has waited for."""
        self._last, self._ended = _buffers(), time.time()
        with _lock:
            _open.pop(self, None)
            _ended.append(self)
        self._names.set(self._before)

    def _has(self, buffer: int, time_s: float) -> bool:
        if buffer:
            return self._first < buffer <= self._last
        return self._began <= time_s <= self._ended


def _buffers() -> int:
    """How many command buffers were committed so far."""
    return int(_core.metal_counters()["buffers"])


def names_of(buffer: int, time_s: float) -> tuple[str, ...]:
    """Names of the guards that a fault may belong to, the outermost first.

    Args:
        buffer: number of its command buffer; 0: not known.
        time_s: seconds since 1970 when it was noticed.
    """
    if not (_open or _ended):
        return ()
    with _lock:
        known = [*_ended, *_open]
    found = [task for task in known if task._has(buffer, time_s)]
    found.sort(key=lambda task: task._number)
    return tuple(dict.fromkeys(task.name for task in found))


def in_this_context() -> tuple[str, ...]:
    """Names of the guards around the caller, in its thread or asyncio task."""
    return () if _names is None else _names.get()


def _names_here() -> ContextVar[tuple[str, ...]]:
    """The names of the guards around the caller."""
    global _names
    if _names is None:
        from contextvars import ContextVar

        with _lock:
            if _names is None:
                _names = ContextVar("mlx_safe_tasks", default=())
    return _names


def forget() -> None:
    """In a forked child: another thread of its parent may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _open.clear()
    _ended.clear()
