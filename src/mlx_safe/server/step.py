"""The step that the generation thread is in: of which kind, and since when."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["KINDS", "Step"]

KINDS = ("load", "prefill", "decode")


class Step:
    """Written by the generation thread, for less than a microsecond; read by any.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now: tuple[str, float] | None = None

    def begin(self, kind: str) -> None:
        """A step of one of `KINDS` begins; the one before has ended."""
        self._now = (kind, self._clock())

    def end(self) -> None:
        """Nothing is computed now."""
        self._now = None

    @property
    def begun(self) -> object:
        """Something else for each step that begins; None: none runs."""
        return self._now

    @property
    def running(self) -> tuple[str, float] | None:
        """Its kind, and how many seconds it has taken so far; None: there is none."""
        now = self._now
        return None if now is None else (now[0], max(0.0, self._clock() - now[1]))
