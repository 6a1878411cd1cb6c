"""What follows a failure: the state of MLX is reset, and everyone gets an answer.

Who runs again, the scheduler says.
"""

from __future__ import annotations

import copy
import logging
import threading

import mlx.core as mx

from .. import _core, _faults, _reports, errors
from .._failures import Failure, FaultWatch, is_out_of_memory, what_it_means
from .._thread_state import ThreadState, drop_failed, seed_anew
from .backoff import REFUSE_FOR_S, Backoff
from .exchange import ids
from .headroom import Headroom
from .health import EXIT_REPLACE, Health
from .in_flight import InFlight
from .logs import fields, of_exception
from .metrics import Metrics
from .mlx_lm.prompt_cache import PromptCache
from .recorder import breadcrumb
from .replies import (
    EXPECTED,
    NotANumber,
    Unavailable,
    is_allocation_failure,
    is_of_all,
    reply_for,
)
from .request import RequestState
from .scheduler import Scheduler

__all__ = ["GenerationFailed", "Recovery", "one_line", "portable"]

log = logging.getLogger("mlx_safe.server")


class GenerationFailed(Exception):
    """Stands, in another thread, for an exception of the generation thread.

    Without its traceback, which would keep the failed arrays alive.
    """


class Recovery:
    """The state of one server after its failures.

    Used by the generation thread; `give_up` and `fail_everyone` by any.

    Args:
        one_rank: False: nothing is run again, any failure ends the process.
    """

    def __init__(
        self,
        scheduler: Scheduler[InFlight],
        health: Health,
        headroom: Headroom,
        prompt_cache: PromptCache,
        metrics: Metrics,
        *,
        one_rank: bool,
    ) -> None:
        self._scheduler = scheduler
        self._health = health
        self._backoff = Backoff()
        self._headroom = headroom
        self._prompt_cache = prompt_cache
        self._metrics = metrics
        self._one_rank = one_rank
        self._faults = FaultWatch()
        self._thread_state: ThreadState | None = None
        self._leaving = threading.Lock()
        self._has_left = False  # that the process ends

    def begin(self) -> None:
        """Called by the generation thread, before all else."""
        self._thread_state = ThreadState()

    def end_alone(self, request: InFlight, exc: Exception) -> None:
        """Ends the request whose own ``exc`` is; the others go on as if nothing was.

        Called in the midst of a step.
        """
        error = portable(exc)
        self._metrics.failures.labels(reply_for(error).code).inc()
        log.error(
            "one request fails; the others go on",
            exc_info=exc,
            extra=fields(id=request.id),
        )
        seed_anew()  # it may have been drawing
        request.fail(error)

    def hold(self) -> None:
        """Called between any two pieces of work."""
        assert self._thread_state is not None
        self._thread_state.hold()

    def check_epoch(self) -> None:
        """Raises the error of the faults that have not been dealt with, if any."""
        self._faults.check()

    def recover(self, exc: Exception) -> None:
        """Answers everyone in flight and makes the thread fit for the next."""
        self._health.enter("recovering", "the state is being reset after a failure")
        fault = self._faults.behind(exc)
        error = fault or portable(exc)
        self._metrics.failures.labels(reply_for(error).code).inc()
        if fault is not None and fault.fatal:
            self.give_up(fault)
            return
        self._faults.report(fault)
        if not self._one_rank:
            self._give_up_among_ranks(fault, exc)
            return
        # What an earlier failure interrupted, and still waits: it has no part in this.
        waited = self._scheduler.requests(RequestState.REPLAY)
        ending = self._scheduler.failure(self._what_it_means(fault, exc))
        replayed = [
            request
            for request in self._scheduler.requests(RequestState.REPLAY)
            if request not in waited
        ]
        again = len(replayed)
        self._log_failure(exc, fault, replayed, ending)
        breadcrumb(
            "recovery",
            type(error).__name__,
            code=None if fault is None else fault.code,
            again=again,
            ended=len(ending),
        )
        if is_out_of_memory(fault, exc):
            self._headroom.out_of_memory()
        self._metrics.replays.inc(again)
        try:
            # Before the answers: a client that tries again at once finds the memory
            # free and /health telling so.
            self._reset(exc, fault, ending)
            late = self._faults.settle()
            if late is not None:
                self.give_up(late)
            if fault is not None and self._backoff.fault(self._scheduler.tokens):
                self._refuse_for_a_while()
            else:
                self._health.enter("ok")
        finally:
            for request in ending:
                request.fail(error)

    def _what_it_means(self, fault: errors.GPUError | None, exc: Exception) -> Failure:
        what = what_it_means(fault, exc)
        disk = self._prompt_cache.disk
        if what is Failure.UNKNOWN and disk is not None and disk.has_restored:
            # It may be the files, which go now (`KVTier.fail`).
            log.warning(
                "prompts that came from --kv-dir are read again, after a failure: %s",
                of_exception(exc),
            )
            return Failure.PASSING
        return what

    def _give_up_among_ranks(
        self, fault: errors.GPUError | None, exc: Exception
    ) -> None:
        """No rank can go on: the others are in a step that this one has left."""
        if fault is not None or is_allocation_failure(exc):
            self.give_up(fault or portable(exc))
            return
        # MLX's own errors are RuntimeErrors; that a peer was lost is one of them.
        unexpected = None if isinstance(exc, RuntimeError) else exc
        log.error(
            "a step of all ranks failed: %s",
            of_exception(exc),
            exc_info=unexpected,
            extra=fields(ended=ids(self._scheduler.requests())),
        )
        why = "The server restarts: a step of all ranks failed."
        self.give_up(Unavailable(why, restarts=True))

    def _refuse_for_a_while(self) -> None:
        count = self._backoff.faults_in_a_row
        if self._backoff.is_told:
            log.error(
                "%d faults in a row: new requests are refused for %d s after each; "
                "the next line of this is at %d",
                *(count, REFUSE_FOR_S, 2 * count),
            )
        self._health.refuse_for(
            REFUSE_FOR_S, f"the GPU has failed {count} times in a row"
        )

    def _log_failure(
        self,
        exc: Exception,
        fault: errors.GPUError | None,
        again: list[InFlight],
        ended: list[InFlight],
    ) -> None:
        extra = fields(
            code=None if fault is None else fault.code,
            replayed=ids(again),
            ended=ids(ended),
        )
        if fault is None and is_allocation_failure(exc):
            log.warning("no memory is left: %s", of_exception(exc), extra=extra)
        elif fault is None:
            log.error("a generation step failed", exc_info=exc, extra=extra)
        else:
            advice = fault.kind.advice
            log.warning("fault of the GPU: %s. %s", fault, advice, extra=extra)

    def fail_everyone(self, exc: Exception) -> None:
        """Also those that are still in the queue."""
        self._scheduler.fail_everyone(exc)

    def give_up(self, exc: Exception, *, reported: bool = False) -> None:
        """Answers everyone, then ends the process with status 75. Any thread.

        Args:
            reported: there is a crash report of it already, as there is of an
                exception that reached terminate.
        """
        if self._prompt_cache.disk is not None:
            self._prompt_cache.disk.withdraw()
        self._health.restarts = True
        self._health.enter("failed", "the GPU is lost; the server is restarting")
        # Several threads may notice it. Nobody is answered before it is reported.
        with self._leaving:
            if not self._has_left:
                self._has_left = True
                self._tell_the_end(exc, reported)
        self.fail_everyone(exc)
        self._health.leave(EXIT_REPLACE, lambda: self.fail_everyone(exc))

    def _tell_the_end(self, exc: Exception, reported: bool) -> None:
        """A line of the log, or two, and a report."""
        _faults.log_terminate()
        why = one_line(exc) if isinstance(exc, Unavailable) else of_exception(exc)
        log.error(
            "the process must be replaced: %s",
            why,
            extra=fields(ended=ids(self._scheduler.requests())),
        )
        # First of all: it is to tell who was in flight.
        if not (reported or _core.terminate_reached()):
            _reports.write("fault", why, getattr(exc, "code", None))

    def _entries_may_stay(
        self, fault: errors.GPUError | None, exc: Exception, ending: list[InFlight]
    ) -> bool:
        """Whether what was complete before a failure may be trusted, and afforded.

        Not after a kernel went astray (9, 0xa, 0xb, …), which may have written
        anywhere. After out of memory they stay at first: the ceiling has been lowered,
        and they go one by one, the oldest first, as what runs again needs their room.
        When that was not enough, it is to have all of it.
        """
        if fault is not None and not fault.retryable:
            return False
        if is_out_of_memory(fault, exc):
            again = self._scheduler.requests(RequestState.REPLAY)
            if ending or any(request.attempts > 1 for request in again):
                return False
        return _epoch_is_exact()

    def _reset(
        self, exc: Exception, fault: errors.GPUError | None, ending: list[InFlight]
    ) -> None:
        """Drops whatever the failure may have left unwritten, or may be due to.

        Arrays of a failed evaluation read as valid afterwards (both regimes), so the
        batch goes. Its owners are the frames of the traceback, and what `Numbers` was
        about to look at: it is free as soon as these are clear. Entries of the prompt
        cache that were complete before the fault may stay.
        """
        for request in self._scheduler.requests():
            request.logprob = None
        drop_failed(exc)
        if self._prompt_cache.disk is not None:
            # Of an exception that is no fault nobody knows what it has touched.
            passing = is_out_of_memory(fault, exc) or (
                fault is not None and fault.retryable
            )
            stray = not (passing and _epoch_is_exact())
            self._prompt_cache.disk.fail(stray=stray)
        if self._entries_may_stay(fault, exc, ending):
            self._prompt_cache.keep_clean(self._faults.clean)
            for request in ending if fault is None else ():
                # Run alone, it failed again: what it began from may be the cause.
                used = getattr(request.context, "prompt_cache_count", -1)
                if request.prompt_key is not None and used >= 0:
                    self._prompt_cache.forget(*request.prompt_key, used)
        else:
            # In place: a replaced cache would live on in mlx-lm's frames.
            self._prompt_cache.clear()
        assert self._thread_state is not None
        self._thread_state.restore()
        self._metrics.resets.inc()


def _epoch_is_exact() -> bool:
    """Whether no fault can have passed uncounted.

    On Metal only the hooks see them all (MLX 0.32.0 forgets some). MLX's other
    backends have no command buffers.
    """
    return not mx.metal.is_available() or _core.metal_status()["verified"]


def portable(exc: Exception) -> Exception:
    """``exc`` as it may be given to another thread: without its traceback."""
    if isinstance(exc, (*EXPECTED, NotANumber)):
        return copy.copy(exc).with_traceback(None)
    if isinstance(exc, MemoryError):
        return MemoryError(str(exc))
    if isinstance(exc, RuntimeError) and is_of_all(exc):
        return RuntimeError(str(exc))  # `reply_for` reads the allocators' messages
    return GenerationFailed(of_exception(exc))


def one_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0]
