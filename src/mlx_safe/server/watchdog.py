"""A generation step that neither ends nor fails is noticed here.

MLX waits for an event without a limit (`Event::wait`), so a stalled GPU is a
thread that never comes back. What is measured is progress that a client could
see, not turns of a loop.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from .. import _reports

__all__ = ["Watchdog"]

log = logging.getLogger("mlx_safe.server")


class Watchdog:
    """Calls ``on_stall`` once when work is in flight and nothing moves.

    Args:
        latest: gives something else after each step of the model that has begun.
        doing: says what is under way and for whom, for the log and the report.

    `moved` may be called from any thread and costs less than a microsecond.
    """

    def __init__(
        self,
        timeout_s: float,
        is_working: Callable[[], bool],
        latest: Callable[[], object],
        doing: Callable[[], str],
        on_stall: Callable[[str], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._is_working = is_working
        self._latest = latest
        self._doing = doing
        self._on_stall = on_stall
        self._moves = 0
        if timeout_s > 0:
            threading.Thread(
                target=self._run, name="mlx-safe-watchdog", daemon=True
            ).start()

    def moved(self) -> None:
        """There was progress, or there is nothing to do."""
        self._moves += 1

    def _run(self) -> None:
        # Looks are counted, not seconds: a process that was stopped itself, or a
        # machine that slept, did not let the step go on either.
        every_s = min(1.0, self._timeout_s / 4)
        looks_max = math.ceil(self._timeout_s / every_s)
        looks, before = 0, (self._moves, self._latest())
        while True:
            time.sleep(every_s)
            now = (self._moves, self._latest())
            if now != before or not self._is_working():
                looks, before = 0, now
                continue
            looks += 1
            if looks > looks_max:
                doing = self._doing()
                log.error(
                    "no progress for %g s (%s); all stacks follow",
                    self._timeout_s,
                    doing,
                    extra={"stacks": _reports.stacks()},
                )
                why = f"a step made no progress for {self._timeout_s:g} s ({doing})"
                _reports.write("stall", why)
                self._on_stall(f"a step made no progress for {self._timeout_s:g} s")
                return
