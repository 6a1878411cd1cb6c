"""What goes on now, in numbers: for ``/health``, ``/metrics`` and the status page.

Keeps nothing: all of it is read from those who own it, on any thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from .mlx_lm.protocols.opaque import Json
from .request import BEFORE_PREFILL, ENDED, RUNNING, Request, RequestState
from .scheduler import Scheduler
from .step import KINDS, Step

__all__ = ["Live"]

STATES = [state for state in RequestState if state not in ENDED]


class Live:
    """The requests in flight, those that wait, the step that runs, and the memory.

    Args:
        memory: bytes by name, as `Headroom.gauges` has them.
        clock: monotonic seconds, as of the scheduler.
    """

    def __init__(
        self,
        scheduler: Scheduler[Any],
        step: Step,
        memory: Callable[[], dict[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self.step = step
        self.memory = memory
        self._clock = clock

    def states(self) -> dict[str, int]:
        """How many requests are in each state; 0 where none is."""
        found = Counter(request.state for request in self._scheduler.requests())
        return {state.value: found[state] for state in STATES}

    def waiting(self) -> list[Request]:
        """Those whose prompt is not being read, the one that came first first."""
        return list(self._scheduler.requests(*BEFORE_PREFILL))

    def age(self, request: Request) -> float:
        """Seconds since it came."""
        return self._since(request.came_at)

    def _since(self, moment: float | None) -> float:
        return 0.0 if moment is None else max(0.0, self._clock() - moment)

    def queue(self) -> tuple[int, float]:
        """(how many wait, seconds that the one has waited that waits longest).

        What was interrupted, or put back to wait for memory, waits since then.
        """
        waiting = self.waiting()
        seconds = [self._since(request.waits_since) for request in waiting]
        return len(waiting), max(seconds, default=0.0)

    def steps(self) -> dict[str, float]:
        """Seconds that the step of each kind has taken so far; 0: it does not run."""
        running = self.step.running
        return {kind: running[1] if running and running[0] == kind else 0.0
                for kind in KINDS}  # fmt: skip

    def requests(self) -> list[Json]:
        """Each request in flight, with its progress; figures and ids, no text."""
        return [
            {
                "id": request.id,
                "path": request.path,
                "state": request.state.value,
                "waits": request.state not in RUNNING,
                "seconds": round(self.age(request), 1),
                "prompt_tokens": request.prompt_tokens,
                "cached_tokens": request.cached_tokens,
                "read_tokens": request.prompt_read[0],
                "to_read": request.prompt_read[1],
                "produced": len(request.produced),
                "max_tokens": request.max_tokens,
                "replays": request.times_replayed,
                "alone": request.run.alone,
            }
            for request in self._scheduler.requests()
        ]

    def doing(self) -> str:
        """What the generation thread is at, in words, and for whom."""
        running = self.step.running
        if running is None:
            return "no step runs"
        whose = [r.id for r in self._scheduler.requests() if r.state not in
                 BEFORE_PREFILL]  # fmt: skip
        current = self._scheduler.current
        if not whose and current is not None:
            whose = [current.id]
        who = f" for {', '.join(whose)}" if whose else ""
        return f"{running[0]}{who}, {running[1]:.0f} s so far"

    def summary(self) -> Json:
        """What ``/health`` tells besides the state."""
        waiting, oldest = self.queue()
        running = self.step.running
        return {
            "in_flight": len(self._scheduler),
            "waiting": waiting,
            "waiting_for_memory": len(self._scheduler.requests(RequestState.HELD)),
            "oldest_waiting_s": round(oldest, 3),
            "step": None
            if running is None
            else {"kind": running[0], "age_s": round(running[1], 3)},
        }
