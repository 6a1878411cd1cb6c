"""Children of multiprocessing that have the model, and their end.

A server may have its model in a child and talk with it by queues (mlx-openai-server
does). When the child dies, nobody tells those who wait: its process looks for it here.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from .. import _faults, _install, errors
from .lost import leave

__all__ = ["Children", "leave_when_lost", "stay"]

# What one process tells another to end with.
_ASKED_FOR = (-signal.SIGTERM, -signal.SIGINT)
# What the child has put into a queue gets into the pipe.
_FLUSH_S = 0.1
_leaving: list[_faults.Subscription] = []


class Children:
    """Of this process. Event loop's thread."""

    def __init__(self) -> None:
        # By child: whether it uses MLX.
        self._known: dict[Any, bool] = {}
        # Those that have ended, and that nobody has waited for yet.
        self._ended: set[Any] = set()

    def note(self) -> None:
        """Which there are, and which use MLX: when one is dead that may be unknown."""
        unawaited = _unawaited()
        self._ended.intersection_update(unawaited)
        for child in unawaited:
            if child not in self._ended:
                self._known[child] = self._known.get(child) or _uses_mlx(child)

    def lost(self) -> list[errors.GPUError]:
        """One for each that has ended by a signal, or with 75, since the last call."""
        self.note()
        found = []
        for child, uses_mlx in list(self._known.items()):
            status = _status(child)
            if status is None:
                continue
            del self._known[child]
            self._ended.add(child)
            is_signal = status < 0 and status not in _ASKED_FOR
            if status == _faults.EXIT_REPLACE or (is_signal and uses_mlx):
                found.append(_error(child.name, status))
        return found


def _unawaited() -> list[Any]:
    """Those that run, and those that have ended and nobody has waited for."""
    process: Any = sys.modules.get("multiprocessing.process")
    # Not `active_children`, which waits for those that have ended.
    return [] if process is None else list(process._children)


def _uses_mlx(child: Any) -> bool:
    """It has a file in the directory of reports, as each process with mlx_safe."""
    directory = _install.status().report_dir
    return directory is not None and Path(directory, f"run-{child.pid}.json").exists()


def _status(child: Any) -> int | None:
    """How it has ended; None: it has not, or is closed."""
    try:
        status: int | None = child.exitcode
    except ValueError:  # closed
        return 0
    return status


def _error(name: str, status: int) -> errors.GPUError:
    how = f"status {status}" if status > 0 else signal.strsignal(-status)
    kind = errors.FaultKind(
        -1,
        f"its process has ended: {how}",
        errors.DeviceLostError,
        "unavailable",
        retryable=False,
        fatal=True,
        advice="See the crash report of that process: mlx-safe reports.",
    )
    return errors.DeviceLostError(f"the process {name} has ended: {how}", kind=kind)


def leave_when_lost() -> None:
    """A child leaves with status 75 after a fatal fault, unless it is to `stay`.

    Else it would fail each request from then on. Its parent starts another. In a
    process that is no child of multiprocessing nothing happens.
    """
    _leaving.append(_faults.on_fault(_leave_if_lost))


def stay() -> None:
    """This process serves: it answers its clients before it leaves."""
    while _leaving:
        _leaving.pop().cancel()


def _leave_if_lost(fault: _faults.Fault) -> None:
    process: Any = sys.modules.get("multiprocessing.process")
    is_child = process is not None and process.parent_process() is not None
    if fault.fatal and fault.source != "terminate" and is_child:
        threading.Event().wait(_FLUSH_S)
        leave()
