"""A generation step that neither ends nor fails is noticed here.

MLX waits for an event without a limit (`Event::wait`), so a stalled GPU is a
thread that never comes back. What is measured is progress that a client could
see, not turns of a loop.
"""

from __future__ import annotations

import faulthandler
import logging
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
        self._moved_at = time.monotonic()
        if timeout_s > 0:
            threading.Thread(
                target=self._run, name="mlx-safe-watchdog", daemon=True
            ).start()

    def moved(self) -> None:
        """There was progress, or there is nothing to do."""
        self._moved_at = time.monotonic()

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, self._timeout_s / 4))
            if not self._is_working():
                self.moved()
            elif time.monotonic() - self._moved_at > self._timeout_s:
                log.error("no progress for %g s; all stacks follow", self._timeout_s)
                sys.stderr.flush()
                faulthandler.dump_traceback(all_threads=True)
                why = f"a step made no progress for {self._timeout_s:g} s"
                _reports.write("stall", why)
                self._on_stall(why)
                return
