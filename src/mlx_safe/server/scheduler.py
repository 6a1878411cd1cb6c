"""Who runs next, and what has become of whom: the only writer of a request's state.

The generation thread calls the `Scheduler` for what happens: a request came, a token, a
step, a failure. Any thread calls it when a client has left. It answers which request
mlx-lm is to have next, and which must leave a batch. It looks at no clock but the one
it is given, and neither at MLX nor at mlx-lm.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from .._failures import Failure, at_once, care_level
from ..memory.budget import Decision
from ..memory.demand import Row
from .admission import Ask, Load, SingleStep
from .logs import fields
from .replies import NotEnoughMemory
from .request import (
    BEFORE_PREFILL,
    ENDED,
    RUNNING,
    SUSPECT_FROM,
    TRANSITIONS,
    Claim,
    Disconnected,
    IllegalTransition,
    Request,
    RequestState,
    Run,
)

__all__ = ["Failure", "Memory", "Scheduler"]

log = logging.getLogger("mlx_safe.server")

# How long a request that had begun may wait to go on, whatever --memory-wait says.
BEGUN_WAIT_S = 60.0

# Whether the generation thread works on a request that comes into this state. One that
# is WAITING it reads and loads a model for, until a batch goes on without it (`step`).
_WORKS = {
    RequestState.WAITING: True,
    RequestState.PREFILL: True,
    RequestState.HELD: False,
    RequestState.REPLAY: False,
}

R = TypeVar("R", bound=Request)


class _Steady:
    """What runs stays as it is, and has its memory for ``steps`` more.

    One for each time between two changes of any state. A thread that changes a state
    puts another in its place, also while the generation thread counts this one down.
    ``seen``: a step has been looked at since the last change.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.seen = False


class Memory(Protocol):
    """Who knows how much memory there is: `headroom.Headroom`."""

    def admits(self, ask: Ask, load: Load) -> Decision:
        """Whether a request may run beside ``load``. Changes nothing."""

    def steps_with_room(self, load: Load) -> int:
        """Makes room for the next steps of a batch; how many fit, 0: not one.

        As long as what runs stays the same.
        """

    def single_step(self, load: Load) -> SingleStep:
        """The same for the sequential path."""

    @property
    def step_size(self) -> int:
        """Tokens of a prompt that are read in one step."""


class Scheduler(Generic[R]):
    """The requests in flight.

    Used by the generation thread; `arrive`, `fail`, `fail_everyone`, `disconnect`,
    `cancel`, `requests` and ``len()`` by any.

    Args:
        attempts_max: how often a request is run again after faults; 0: nothing is.
        wait_s: seconds that a request may wait for memory.
        be_careful: called with how often a request was run again in vain, when prompts
            are to be read in smaller steps; with None when as usual.
        clock: monotonic seconds.
        one_rank: False: all ranks take the same steps, and nobody is put off.

    Attributes:
        tokens: tokens passed on to any client so far.
        current: the request that mlx-lm is about to start, or works on alone.
        events: how often so far: ``held``, ``preempted``, ``refused``, ``too_long``.
    """

    def __init__(
        self,
        memory: Memory,
        attempts_max: int,
        wait_s: float,
        be_careful: Callable[[int | None], None] = lambda level: None,
        clock: Callable[[], float] = time.monotonic,
        one_rank: bool = True,
    ) -> None:
        self._memory = memory
        self._attempts_max = attempts_max
        self._wait_s = wait_s
        self._be_careful = be_careful
        self._clock = clock
        self._one_rank = one_rank
        self._lock = threading.Lock()
        self._in_flight: dict[R, None] = {}  # those that came first come first
        # How many requests may run at a time; None: as many as mlx-lm likes.
        self._limit: int | None = None
        self._line = 0
        self._steady = _Steady()
        self.tokens = 0
        self.current: R | None = None
        self.events: Counter[str] = Counter()

    # -- the queues ------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._in_flight)

    def requests(self, *states: RequestState) -> list[R]:
        """Those in flight that are in one of ``states``, or all; oldest first."""
        with self._lock:
            found = list(self._in_flight)
        return [r for r in found if r.state in states] if states else found

    def held(self) -> list[R]:
        """Those that wait for memory, in the order of their line.

        Those that a failure interrupted come before the others: what was begun goes
        on, and nothing else runs as long as it is to be done with care.
        """
        found = self.requests(RequestState.HELD)
        return sorted(found, key=lambda r: (not r.times_replayed, r.line or 0))

    def load(self) -> Load:
        """What runs, in numbers."""
        return self._load_of(self.requests(*RUNNING))

    @staticmethod
    def _load_of(running: list[R]) -> Load:
        return Load(
            rows=tuple(
                Row(r.claim.prompt, r.claim.total, r.state is RequestState.PREFILL)
                for r in running
                if r.claim is not None
            ),
            owned={r.run.uid: r.run.owned for r in running},
            length=sum(r.run.length for r in running),
        )

    def prompt_lengths(self) -> dict[object, int]:
        """Tokens of the prompt of each request that runs, by mlx-lm's uid."""
        running = self.requests(*RUNNING)
        return {r.run.uid: r.claim.prompt for r in running if r.claim is not None}

    # -- who runs next ---------------------------------------------------------------

    def arrive(self, request: R) -> None:
        """A request has come. Any thread."""
        request.came_at = request.waits_since = self._clock()
        with self._lock:
            self._in_flight[request] = None

    def take(self, request: R) -> bool:
        """The generation thread has got a request; whether mlx-lm gets it now.

        Otherwise it has ended while it was queued, or it is a suspect: it was in a
        batch with which processes died. As after a failure that is UNKNOWN, `next`
        gives it out when all that runs has ended, and it runs alone.
        """
        if not (self._one_rank and request.deaths >= SUSPECT_FROM):
            return self._change(request, RequestState.WAITING)
        if self._interrupt(request):
            self._allow(1)
            log.warning(
                "a request is run alone: the server has died %d times while it worked "
                "on it",
                request.deaths,
                extra=fields(id=request.id),
            )
        return False

    def next(self) -> R | None:
        """The request that mlx-lm is to have now; None: none that is known here.

        First those that a failure interrupted, in their order; then those that wait for
        memory. mlx-lm asks whenever it has begun with what it was given.
        """
        self.current = None
        interrupted = self.requests(RequestState.REPLAY)
        if interrupted:
            return self._give_out(interrupted[0]) if self._has_room() else None
        held = self.held()
        if self._limit is not None:
            careful = [r for r in held if r.times_replayed]
            if careful or self._at_mlx_lm():
                if not self._has_room():
                    return None
                held = careful
            else:
                # All that was to be done with care is done.
                self._limit = None
                self._be_careful(None)
        chosen = self._whose_turn(held)
        return None if chosen is None else self._give_out(chosen)

    def takes_new(self) -> bool:
        """Whether mlx-lm may have one that has just come, when `next` has none."""
        return self._limit is None

    def _at_mlx_lm(self) -> list[R]:
        return self.requests(RequestState.WAITING, *RUNNING)

    def _allow(self, count: int) -> None:
        """So many run at a time, until all that is to be done with care is done."""
        self._limit = count if self._limit is None else min(count, self._limit)

    def _has_room(self) -> bool:
        return self._limit is None or len(self._at_mlx_lm()) < self._limit

    def _give_out(self, request: R) -> R | None:
        request.run = Run()
        request.prompt_read = (0, 0)
        return request if self._change(request, RequestState.WAITING) else None

    def _whose_turn(self, held: list[R]) -> R | None:
        """Of ``held``: it fits now, or has waited long enough."""
        now = self._clock()
        for request in held:
            if request.claim is None or now >= request.claim.deadline:
                return request
        if not held or held[0].claim is None:
            return None
        first, claim = held[0], held[0].claim
        # What it would reuse is not known here; as if it were to be evicted.
        found = self._judge(first, claim)
        return None if found.verdict == "wait" else first

    # -- memory ----------------------------------------------------------------------

    def ask(self, request: R, prompt: int, total: int, reusable: int = 0) -> Decision:
        """mlx-lm begins with ``request``, whose prompt has been read as tokens.

        "admit": it runs. "wait": it is held until `next` gives it out. Otherwise the
        caller ends it.

        Args:
            prompt, total: tokens, as in `Claim`. reusable: as in `Ask`.
        """
        now = self._clock()
        deadline = now + self._patience(request)
        if request.claim is not None:  # it has been held since it asked
            deadline = request.claim.deadline
        request.claim = claim = Claim(prompt, total, deadline)
        found = self._judge(request, claim, reusable)
        verdict = found.verdict
        if verdict == "admit" and self._is_behind(request) and now < deadline:
            verdict = "wait"  # those that came first go first
            found = replace(found, verdict=verdict)
        if verdict == "wait":
            self._hold(request)
        elif verdict == "admit":
            self._admit(request, reusable if found.take_over else 0)
        else:
            self.events["refused" if verdict == "refuse" else "too_long"] += 1
        return found

    def _admit(self, request: R, taken_over: int) -> None:
        self.current = request
        request.line = None
        request.run.takes_over = taken_over > 0
        request.run.owned = taken_over
        self._change(request, RequestState.PREFILL)

    def _patience(self, request: R) -> float:
        """Seconds that it may wait: what was begun is not given up for a short flag."""
        return max(self._wait_s, BEGUN_WAIT_S if request.has_begun else 0.0)

    def _judge(self, request: R, claim: Claim, reusable: int = 0) -> Decision:
        held = self.requests(RequestState.HELD)
        # One that was held itself may wait on, even when nothing else runs.
        ahead = len([r for r in held if r is not request]) + (request.line is not None)
        ask = Ask(
            prompt=claim.prompt,
            total=claim.total,
            reusable=reusable,
            ahead=len(self.requests(*RUNNING)) + ahead,
            begun=request.has_begun,
            may_wait=self._clock() < claim.deadline,
            step_max=request.step_max,
        )
        return self._memory.admits(ask, self.load())

    def _is_behind(self, request: R) -> bool:
        """Others wait for memory that go before it."""
        # One that has a place in the line is given out when its turn has come.
        if request.line is not None:
            return False
        held = self.requests(RequestState.HELD)
        return any(r.times_replayed or not request.times_replayed for r in held)

    def _hold(self, request: R) -> None:
        if self._put_in_line(request):
            self.events["held"] += 1
            waiting = len(self.requests(RequestState.HELD)) + 1
            log.info(
                "a request waits for memory", extra=fields(id=request.id, wait=waiting)
            )
        self._change(request, RequestState.HELD)

    # -- steps -----------------------------------------------------------------------

    def inserted(self, uid: object) -> R | None:
        """mlx-lm has put the request that it starts into its batch."""
        if self.current is not None:
            self.current.run.uid = uid
        return self.current

    def works_on(self, *requests: R, does: bool = True) -> None:
        """The generation thread works on ``requests``, or no more: they wait."""
        for request in requests:
            with self._lock:  # its client may leave, and then it is not to be touched
                if not request.is_ended:
                    request.note_work(does)

    def serve_alone(self, request: R) -> None:
        """mlx-lm's sequential path works on ``request``."""
        request.run.alone = True
        self.current = request

    def begin(self, request: R) -> bool:
        """mlx-lm has begun with it. Returns whether its client is yet to know."""
        is_first = not request.has_context
        request.has_context = True
        return is_first

    def progress(self, request: R, done: int, total: int) -> None:
        """So much of what is to be read of its prompt has been read."""
        request.prompt_read = (done, total)

    def repeat(self, request: R) -> None:
        """This run makes the answer from its first token, the client's included."""
        request.run.repeated = len(request.produced)

    def token(self, request: R, token: int, is_last: bool) -> bool:
        """A token of its answer; whether the client is to have it."""
        run = request.run
        run.made += 1
        if request._state is not RequestState.DECODE:
            if request.is_ended:  # its client left during the step
                return False
            if request.first_token_at is None:
                request.first_token_at = self._clock()
            if request.state is RequestState.PREFILL:
                self._change(request, RequestState.DECODE)
        if run.repeated:
            run.repeated -= 1
            return False
        request.produced.append(token)
        self.tokens += 1
        if is_last:
            self._change(request, RequestState.FINISHED)
        return True

    def goes_on(self) -> bool:
        """A step of the batch is due: whether all is as it was at the one before.

        Then what runs has its memory, and nobody has left. Otherwise `step` is asked.
        """
        steady = self._steady
        if steady.steps > 0:
            steady.steps -= 1
            return True
        return False

    @property
    def is_unchanged(self) -> bool:
        """Whether no request has come or gone on since the last `step`."""
        return self._steady.seen

    def step(self) -> list[R]:
        """A step is due that `goes_on` knows nothing of.

        Returns:
            Those that must leave the batch first. They are held, or have been answered.
        """
        steady = self._steady
        self.works_on(*self.requests(RequestState.WAITING), does=False)
        running = self.requests(*RUNNING)
        steps = self._memory.steps_with_room(self._load_of(running)) if running else 1
        if steps > 0:
            # In the first one what came and left is copied: the second tells what a
            # step takes. When a state has changed meanwhile another has its place.
            steady.steps = steps - 1 if steady.seen else 0
            steady.seen = True
            return []
        # The one that came last goes first; what it has so far is not lost. Its
        # memory is free only when mlx-lm has dropped it, so it is one at a time.
        last = running[-1]
        if len(running) > 1:
            self._preempt(last)
        else:
            self._end_for_memory(last)
        return [last]

    def single_step(self, request: R, length: int, reads: bool) -> SingleStep:
        """The sequential path has done a step, after which it has ``length`` tokens.

        With "smaller" it is held, and goes on with smaller steps: mlx-lm has fixed
        their size. With "none" it has been answered.

        Args:
            reads: its next step reads of its prompt. Its state says so until its first
                token has been passed on, which is later.
        """
        request.run.length = length
        load = self.load()
        rows = tuple(replace(row, is_reading=reads) for row in load.rows)
        found = self._memory.single_step(replace(load, rows=rows))
        if found == "smaller":
            request.step_max = self._memory.step_size
            self._hold(request)
        elif found == "none":
            self._end_for_memory(request)
        return found

    def read_slowly(self, request: R) -> None:
        """On the sequential path: it is held, and goes on with smaller steps.

        For no want of memory: it goes on as soon as it is its turn.
        """
        request.step_max = self._memory.step_size
        self._put_in_line(request)
        self._change(request, RequestState.HELD)

    def _put_in_line(self, request: R) -> bool:
        """Whether it had no place in the line for memory before."""
        if request.line is not None:
            return False
        self._line += 1
        request.line = self._line
        return True

    def _preempt(self, request: R) -> None:
        claim = request.claim
        assert claim is not None
        deadline = self._clock() + self._patience(request)
        request.claim = Claim(claim.prompt, claim.total, deadline)
        self.events["preempted"] += 1
        request.stop_run()
        self._hold(request)

    def _end_for_memory(self, request: R) -> None:
        self.events["refused"] += 1
        log.warning(
            "memory ran out for a request that runs alone: it gets a 503",
            extra=fields(id=request.id, tokens=len(request.produced)),
        )
        self.fail(
            request,
            NotEnoughMemory("There is not enough memory to go on with this request."),
        )

    # -- failures --------------------------------------------------------------------

    def not_begun(self, request: R) -> None:
        """mlx-lm has failed to begin with it; `failure` follows."""
        request.run.failed = True

    def failure(self, what: Failure) -> list[R]:
        """A step has failed, and mlx-lm has lost all that it had.

        PASSING, TOO_MUCH, TOO_LONG: those with attempts left are run again. FINAL:
        those that it struck end. UNKNOWN: all are run again one by one, so that only
        the one that causes it ends; and that one when it is alone. Those that still
        wait for their turn had no part in any of it: they are run again, and lose no
        attempt.

        Returns:
            Those that end; the caller answers them when the state has been reset.
        """
        finished = self.requests(RequestState.FINISHED)
        for request in finished:
            self.complete(request)
        for request in self.requests(RequestState.WAITING):
            if request.line is not None and not request.run.failed:
                self._change(request, RequestState.HELD)  # it keeps its place
        lost = self._at_mlx_lm()
        if self._attempts_max == 0:
            return lost
        ran = [r for r in lost if r.state in RUNNING or r.run.failed]
        if not ran and not finished:
            ran = lost  # it must be one of these
        ending = self._ending(what, ran)
        for request in lost:
            if request not in ending:
                self._interrupt(request)
        if what is not Failure.UNKNOWN:
            self._run_with_care(what)
        return ending

    def _ending(self, what: Failure, ran: list[R]) -> list[R]:
        if what is Failure.FINAL:
            return ran
        if what is Failure.UNKNOWN:
            self._allow(1)
            return ran if len(ran) == 1 else []
        ending = [r for r in ran if r.attempts >= self._attempts_max]
        for request in ran:
            request.attempts += request not in ending
        return ending

    def _interrupt(self, request: R) -> bool:
        request.claim = request.line = None  # it asks anew
        interrupted = self._change(request, RequestState.REPLAY)
        request.times_replayed += interrupted
        return interrupted

    def _run_with_care(self, what: Failure) -> None:
        """After `TOO_MUCH` the budget, which has learned, finds the largest steps that
        fit, and only where that was too much they are smaller still.
        """
        again = self.requests(RequestState.REPLAY)
        if not again:
            return
        level = max(request.attempts for request in again)
        limit = at_once(what, len(again), level, self._attempts_max)
        if limit is not None:
            self._allow(limit)
        care = care_level(what, level, self._attempts_max)
        if care is not None:
            self._be_careful(care)

    # -- ends ------------------------------------------------------------------------

    def complete(self, request: R) -> None:
        """mlx-lm has ended it."""
        if self._end(request, RequestState.COMPLETED, "completed"):
            request.send(None)

    def fail(self, request: R, exc: Exception) -> bool:
        """Ends it with ``exc``; False when it had ended already. Any thread."""
        return self._answer(request, RequestState.FAILED, exc)

    def disconnect(self, request: R) -> None:
        """Its client has closed its connection. Any thread."""
        left = Disconnected("the client closed the connection")
        self._answer(request, RequestState.DISCONNECTED, left)

    def cancel(self, request: R) -> None:
        """Its handler wants no more of it, and waits for nothing. Any thread."""
        self._end(request, RequestState.DISCONNECTED, "ended")

    def fail_everyone(self, exc: Exception) -> None:
        """Ends all that is in flight with ``exc``. Any thread."""
        for request in self.requests():
            self.fail(request, exc)

    def _answer(self, request: R, state: RequestState, exc: Exception) -> bool:
        ended = self._end(request, state, f"failed: {type(exc).__name__}", exc)
        if ended:
            # A copy: each client's thread raises its own.
            request.send(copy.copy(exc))
        return ended

    def _end(
        self,
        request: R,
        state: RequestState,
        how: str,
        error: Exception | None = None,
    ) -> bool:
        ended = self._change(request, state)
        if ended:
            request.ended_at, request.ended_with = self._clock(), error
            if state is not RequestState.COMPLETED:  # which mlx-lm has dropped
                # After the state: a run that begins from now on looks at that.
                request.stop_run()
            request.note_end(how)
        return ended

    def _change(self, request: R, state: RequestState) -> bool:
        """The only place where a state changes. False: it had ended already.

        Raises:
            IllegalTransition: the table has no such change.
        """
        with self._lock:
            old = request.state
            if old in ENDED:
                return False
            if (old, state) not in TRANSITIONS:
                raise IllegalTransition(f"{old.value} to {state.value}")
            if state in BEFORE_PREFILL and old not in BEFORE_PREFILL:
                request.waits_since = self._clock()
            request._state = state
            if state in _WORKS:
                request.note_work(_WORKS[state])
            self._steady = _Steady()
            if state in ENDED:
                self._in_flight.pop(request, None)
            return True
