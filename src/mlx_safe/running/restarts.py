"""``mlx-safe run --supervise``: starts a program again when a fault has ended it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time

from .._faults import EXIT_REPLACE
from ..server import logs
from ..server.supervisor import BACK_OFF_S, CRASHES_MAX, how_it_ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

__all__ = ["Restarts"]

log = logging.getLogger("mlx_safe.supervisor")

# What ends a program; a second of the same kind must reach it, too.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# What a program may live on after: it reads its configuration anew, say.
PASSED_ON = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A terminal sends these to all in its foreground.
OF_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
# One that has lived so long is not counted among the crashes in a row.
SOUND_S = 60.0


def _both_in_foreground(child: int) -> bool:
    """Whether a Ctrl-C at the terminal reaches this process and ``child``."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp() == os.getpgid(child)
    except OSError:
        return False
    finally:
        os.close(terminal)


class Restarts:
    """Runs one program after another.

    Args:
        command: the program's path and its arguments.
        environment: of the program.
        listener: a socket that each of them inherits, under the same descriptor.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        listener: socket.socket | None,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._fds = () if listener is None else (listener.fileno(),)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        # The last signal that was passed on to a program that may live on.
        self._passed_on: int | None = None
        # One that came while a program was being started.
        self._early: int | None = None

    def _pass_on(self, number: int, frame: object) -> None:
        """Signal handler: passes the signal on; between two programs it is a stop."""
        if self._child is None:
            self._early = number
        elif self._child.poll() is None:
            self._passed_on = number
            self._child.send_signal(number)
        else:
            self._stopping.set()

    def _stop(self, number: int, frame: object) -> None:
        """Signal handler: passes the signal on and restarts no more."""
        is_first = not self._stopping.is_set()
        self._stopping.set()
        child = self._child
        if child is None or child.poll() is not None:
            return
        # A second SIGINT for one Ctrl-C makes uvicorn drop its clients.
        is_of_terminal = number in OF_TERMINALS and is_first
        if is_of_terminal and _both_in_foreground(child.pid):
            return
        child.send_signal(number)

    def run(self) -> int:
        """Returns the exit status for this process.

        Raises:
            OSError: the program cannot be executed.
        """
        logs.set_up("INFO", "text", name="SUPERVISOR")
        for number in (*STOPS, *PASSED_ON):
            # nohup, and shells for what they start in the background, have it ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                is_stop = number in STOPS
                signal.signal(number, self._stop if is_stop else self._pass_on)
        crashes = 0
        while True:
            began = time.monotonic()
            status = self._run_once()
            # One that a signal of its user's has ended was to end.
            asked = self._stopping.is_set() or -status == self._passed_on
            if asked or (status >= 0 and status != EXIT_REPLACE):
                return status if status >= 0 else 128 - status
            crashes = 0 if time.monotonic() - began > SOUND_S else crashes
            crashes += 1
            how = how_it_ended(status)
            if crashes > CRASHES_MAX:
                log.error(
                    "the program has ended %d times in a row, %s: giving up",
                    *(crashes, how),
                )
                return 1
            delay = BACK_OFF_S[min(crashes, len(BACK_OFF_S)) - 1]
            log.warning(
                "the program has ended %s; starting it again in %.0f s", how, delay
            )
            if self._stopping.wait(delay):
                return 0

    def _run_once(self) -> int:
        self._child = self._passed_on = None
        self._child = subprocess.Popen(
            self._command, env=self._environment, pass_fds=self._fds
        )
        early, self._early = self._early, None
        if early is not None:
            self._pass_on(early, None)
        if self._stopping.is_set():
            self._child.terminate()
        return self._child.wait()
