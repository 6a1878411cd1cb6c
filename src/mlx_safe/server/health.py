"""The health of the server: what /health says, and the way out.

One object per server, shared by the generation thread, the handler threads and
the thread that hears of faults. Thread-safe.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from .. import _core, _output, _reports, testing
from .._faults import EXIT_REPLACE
from .recorder import breadcrumb

__all__ = ["EXIT_REPLACE", "Health"]

log = logging.getLogger("mlx_safe.server")

# How long the process waits for clients that send their requests or get their
# answers. Turns are counted, not seconds: while the process was stopped they could
# not write either.
ANSWER_TIMEOUT_S = 5.0
ANSWER_TURN_S = 0.01


class Health:
    """``loading`` → ``ok`` ⇄ ``recovering``, ``refusing``; ``failed`` is the end.

    While ``recovering`` (a few hundredths of a second) requests are taken and
    wait; while ``refusing`` they are answered 503.

    Args:
        on_ready: called once, when the model has been loaded.

    Attributes:
        restarts: the process is about to leave for another to take its place.
        drain: called before the process ends: waits until what was answered is sent.
        count_held: of the clients that count, how many need not be waited for when
            it restarts: the supervisor keeps what they are sending.
    """

    def __init__(self, on_ready: Callable[[], None] = lambda: None) -> None:
        self._on_ready = on_ready
        self._is_loaded = threading.Event()
        self._lock = threading.Lock()
        self._status = "loading"
        self._reason = "the model is being loaded"
        self._answering = 0
        self.count_held: Callable[[], int] = lambda: 0
        self.drain: Callable[[], None] = lambda: None
        self._leaving = False
        self.restarts = False
        self._refuse_until = 0.0

    @property
    def state(self) -> str:
        """One of the names above."""
        state = self._status
        is_over = state == "refusing" and time.monotonic() >= self._refuse_until
        return "ok" if is_over else state

    @property
    def reason(self) -> str | None:
        """Why requests cannot be served; None when they can."""
        return None if self.state == "ok" else self._reason

    def refuse_for(self, seconds: float, reason: str) -> None:
        """``refusing`` for so long, then ``ok`` by itself."""
        self._refuse_until = time.monotonic() + seconds
        self.enter("refusing", reason)

    def wait_loaded(self, seconds: float | None) -> bool:
        """Whether the model is loaded, or never will be, within ``seconds``.

        None: however long it takes.
        """
        return self._is_loaded.wait(seconds)

    def enter(self, state: str, reason: str = "") -> None:
        """Changes the state; nothing leads out of ``failed``."""
        with self._lock:
            if self._status == "failed":
                return
            is_ready = (self._status, state) == ("loading", "ok")
            self._status, self._reason = state, reason
            breadcrumb("server", state)
        self._is_loaded.set()
        if is_ready:
            self._on_ready()

    def arrive(self) -> bool:
        """A client is about to be accepted; False: not any more, the process leaves."""
        with self._lock:
            self._answering += not self._leaving
            return not self._leaving

    def return_(self) -> None:
        """A client that had its answer has asked again, or its connection ends."""
        with self._lock:
            self._answering += 1

    def depart(self) -> None:
        """A client that arrived has been served."""
        with self._lock:
            self._answering -= 1

    def _waits_for(self) -> int:
        return self._answering - (self.count_held() if self.restarts else 0)

    def leave(self, status: int, answer_rest: Callable[[], None]) -> None:
        """Ends the process with ``status`` once the clients have their answers.

        No other is accepted from now on: under a supervisor, who has the socket as
        well, it waits for the next server.

        ``answer_rest`` is called again and again meanwhile, for requests that
        come in late. Called on any thread but a handler's. At most `ANSWER_TIMEOUT_S`
        seconds are spent on waiting. Not by ``sys.exit``: the interpreter would
        wait for MLX, whose threads may be lost.
        """
        with self._lock:
            self._leaving = True
        for _ in range(round(ANSWER_TIMEOUT_S / ANSWER_TURN_S)):
            if not self._waits_for():
                break
            answer_rest()
            time.sleep(ANSWER_TURN_S)
        if left := self._waits_for():
            log.error("%d clients could not be answered", left)
        testing.tell_unfired()
        self.drain()
        logging.shutdown()
        _output.flush()
        _reports.finish()
        _reports.remove_run_file()
        if status == EXIT_REPLACE:
            _core.terminate_drained()
        os._exit(status)
