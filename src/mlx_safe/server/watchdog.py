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

    ``doing`` says what is under way and for whom; it comes into the log and the report.

    `moved` may be called from any thread and costs less than a microsecond.
    """

    def __init__(
        self,
        timeout_s: float,
        is_working: Callable[[], bool],
        doing: Callable[[], str],
        on_stall: Callable[[str], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._is_working = is_working
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
        looks, moves = 0, self._moves
        while True:
            time.sleep(every_s)
            if self._moves != moves or not self._is_working():
                looks, moves = 0, self._moves
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
