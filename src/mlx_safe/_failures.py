"""What a failed step means for what was computed in it, and how it is tried again.

Both who begin again go by it. The server (`mlx_safe.server.recovery`) has mlx-lm serve
the request once more. The batch generator in another's server (`mlx_safe.mlx_lm.batch`)
inserts it once more. ARCHITECTURE.md says what else
they share, and what not. The functions are pure, for any thread.
"""

from __future__ import annotations

import enum

from . import _core, _faults, _reports, errors
from .errors import is_allocation_failure

__all__ = [
    "SMALLEST",
    "Failure",
    "FaultWatch",
    "at_once",
    "care_level",
    "fault_behind",
    "is_out_of_memory",
    "what_it_means",
]


# Of care: the last try. Each prompt begins with the smallest steps.
SMALLEST = 16


class Failure(enum.Enum):
    """What a failure of a step means for the requests that were in it."""

    PASSING = "they may be tried again"
    TOO_MUCH = "they may be tried again, fewer at a time and with less memory"
    TOO_LONG = "they may be tried again, fewer at a time and in smaller steps"
    FINAL = "they must not be tried again"
    UNKNOWN = "one of them causes it"


class FaultWatch:
    """The faults that a loop of steps has yet to deal with. Used by its thread.

    Attributes:
        clean: the epoch up to which there was none, or all were dealt with.
    """

    __slots__ = ("clean",)

    def __init__(self) -> None:
        self.clean = _core.epoch()

    def check(self) -> None:
        """Raises the error of those that are new. Without one, under 0.1 µs."""
        if _core.epoch() != self.clean:
            _faults.check(self.clean)

    def behind(self, exc: Exception) -> errors.GPUError | None:
        """The fault that a step has failed with, by ``exc`` or by the log."""
        return fault_behind(exc, self.clean)

    def report(self, fault: errors.GPUError | None) -> None:
        """Writes a crash report of ``fault``, if nothing else does."""
        # One that is in the log has its report from there.
        if fault is not None and not fault.faults:
            _reports.write_fault_beside(str(fault), fault.code)

    def settle(self) -> errors.GPUError | None:
        """Called after the reset: all so far are dealt with, but for what it returns.

        That is a fatal fault, which may have come while the state was being reset.
        """
        late = [f for f in _faults.faults(self.clean) if f.fatal]
        self.clean = _core.epoch()
        _faults.deal_with()
        return errors.from_faults(late) if late else None


def fault_behind(exc: Exception, since: int) -> errors.GPUError | None:
    """The fault behind ``exc``, those counted after epoch ``since`` included.

    A new object, without a traceback: it may go to other threads.
    """
    fault = errors.from_exception(exc)
    logged = _faults.faults(since)
    if logged:
        worst = errors.from_faults(logged)
        # An error may name an earlier, milder fault than the log does.
        if fault is None or worst.fatal:
            return worst
        fault.faults = tuple(logged)
    if fault is None:
        return None
    return fault.kind.make(str(fault), fault.faults)


def is_out_of_memory(fault: errors.GPUError | None, exc: Exception) -> bool:
    """Whether ``fault``, or without one ``exc``, tells of too little memory."""
    if fault is None:
        return is_allocation_failure(exc)
    return isinstance(fault, errors.OutOfMemoryError)


def what_it_means(fault: errors.GPUError | None, exc: Exception) -> Failure:
    """What a failure means for the requests that were in it."""
    if fault is not None and not fault.retryable:
        return Failure.FINAL
    if is_out_of_memory(fault, exc):
        return Failure.TOO_MUCH
    # What held up the display passes in smaller pieces.
    if isinstance(fault, errors.MetalInteractivityError):
        return Failure.TOO_LONG
    return Failure.UNKNOWN if fault is None else Failure.PASSING


def at_once(what: Failure, count: int, level: int, attempts_max: int) -> int | None:
    """How many of ``count`` requests are tried again at a time; None: all.

    One at a time the last time, so that one cannot take others along. After
    `TOO_MUCH` and `TOO_LONG`, before that fewer at a time.

    Args:
        level: how often the most unlucky of them has been tried again, this one
            included.
    """
    if level >= min(2, attempts_max):
        return 1
    return None if what is Failure.PASSING else max(1, count // 2)


def care_level(what: Failure, level: int, attempts_max: int) -> int | None:
    """How many times four prompts are read in smaller steps; None: as before.

    At once after `TOO_LONG`; after `TOO_MUCH` fewer at a time may be enough. The last
    time `SMALLEST`: how much less would do nobody knows, and what fits is answered.
    """
    if what in (Failure.TOO_MUCH, Failure.TOO_LONG) and level >= max(2, attempts_max):
        return SMALLEST
    if what is Failure.TOO_MUCH:
        return level - 1
    return level if what is Failure.TOO_LONG else None
