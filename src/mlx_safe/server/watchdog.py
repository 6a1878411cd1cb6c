"""A generation step that neither ends nor fails is noticed here.

MLX waits for an event without a limit (`Event::wait`), so a stalled GPU is a
thread that never comes back. What is measured is progress that a client could
see, not turns of a loop.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import sys
import threading
import time
from collections.abc import Callable

from .. import _reports

__all__ = ["Watchdog"]

log = logging.getLogger("mlx_safe.server")


class Watchdog:
    """Calls ``on_stall`` once when work is in flight and nothing moves.

    `moved` may be called from any thread and costs less than a microsecond.
    """

    def __init__(
        self,
        timeout_s: float,
        is_working: Callable[[], bool],
        on_stall: Callable[[str], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._is_working = is_working
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
                log.error("no progress for %g s; all stacks follow", self._timeout_s)
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                why = f"a step made no progress for {self._timeout_s:g} s"
                _reports.write("stall", why)
                self._on_stall(why)
                return
