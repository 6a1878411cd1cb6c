"""mlx-lm's batch generator, held between its steps.

Used by the generation thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import _reports
from .in_flight import InFlight
from .mlx_lm import compat
from .mlx_lm.kv_tier import KVTier
from .mlx_lm.protocols.generation import AnswerResponse, BatchGenerator, PromptResponse
from .mlx_lm.protocols.opaque import Uid
from .not_numbers import Numbers
from .observer import Observer
from .own_failures import OwnFailures
from .prefill import PROBE, PrefillStep, width
from .request import RequestState
from .scheduler import Scheduler
from .step import Step

__all__ = ["paced", "watched"]


class _Read:
    """How much of their prompts has been read, by uid."""

    def __init__(self) -> None:
        self._done: dict[Uid, int] = {}

    def tokens(self, prompts: Sequence[PromptResponse]) -> int:
        """In the last step; the rows of a step are as long as the longest."""
        before, self._done = self._done, {r.uid: int(r.progress[0]) for r in prompts}
        longest = max(done - before.get(uid, 0) for uid, done in self._done.items())
        return longest * len(self._done)


def _narrow(batch: BatchGenerator) -> int:
    """The next step of ``batch`` reads so much of each prompt that little is padding.

    What it reads is known to all ranks alike, by what was inserted and removed.

    Returns:
        How many tokens it reads, all rows together, with what is padding.
    """
    parts = compat.next_parts(batch)
    if not parts:
        return 0
    size = min(batch.prefill_step_size, width(parts))
    compat.set_prefill_step(batch, size)
    return len(parts) * min(size, max(parts))


def paced(
    cls: type[BatchGenerator],
    prefill: PrefillStep,
    step: Step,
    share: Callable[[object], object],
) -> type[BatchGenerator]:
    """A subclass of ``cls`` for one of several ranks, who agree on the size of steps.

    Whether a step reads is known to all alike, without communication: by what was
    inserted, set and removed. So they meet for its size at the same step.
    """

    class Paced(cls):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._reading: dict[Uid, None] = {}
            self._read = _Read()
            super().__init__(*args, **kwargs)

        def insert_segments(self, *args: object, **kwargs: object) -> object:
            uids = super().insert_segments(*args, **kwargs)
            self._reading.update(dict.fromkeys(uids))
            return uids

        def remove(
            self, uids: Sequence[Uid], *args: object, **kwargs: object
        ) -> object:
            self._are_read(uids)
            return super().remove(uids, *args, **kwargs)

        def _are_read(self, uids: Sequence[Uid]) -> None:
            for uid in uids:
                self._reading.pop(uid, None)

        def next(self) -> tuple[Sequence[PromptResponse], Sequence[AnswerResponse]]:
            _reports.sample_memory()
            rows = min(len(self._reading), self.prefill_batch_size)
            if rows:
                prefill.agree(share, rows)
                _narrow(self)
            step.begin("prefill" if rows else "decode")
            prompts, generated = super().next()
            running = step.running
            if prompts and running is not None:
                prefill.took(self._read.tokens(prompts), running[1])
            self._are_read([r.uid for r in prompts if r.end_of_prompt])
            self._are_read([r.uid for r in generated])
            return prompts, generated

    Paced.__name__ = cls.__name__
    return Paced


def watched(
    cls: type[BatchGenerator],
    scheduler: Scheduler[InFlight],
    observer: Callable[[], Observer],
    own: OwnFailures,
    numbers: Numbers,
    prefill: PrefillStep,
    step: Step,
    is_awaited: Callable[[], bool],
    disk: KVTier | None = None,
) -> type[BatchGenerator]:
    """A subclass of ``cls`` (mlx-lm's `BatchGenerator`) that asks before each step.

    Between two steps it also looks for requests that have been stopped. mlx-lm takes
    those out only when it has a response for them and its turn of half a second is
    over (`TimeBudget`, 0.31 to 0.32). So it gets an empty response for them instead of
    a step, and then none, which ends its turn.

    So does it when ``is_awaited`` says that somebody has come in: mlx-lm takes one new
    request a turn, who would wait for half a second otherwise.
    """

    class Watched(cls):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._requests: dict[Uid, InFlight] = {}  # of what is in the batch, by uid
            self._missing: set[str] = set()
            self._read = _Read()
            self._leaving = False
            self._has_stepped = False  # in this turn
            super().__init__(*args, **kwargs)

        def insert_segments(self, *args: object, **kwargs: object) -> object:
            insert = super().insert_segments
            uids = own.make(lambda: insert(*args, **kwargs), self._never_inserted)
            request = scheduler.inserted(*uids)
            if request is not None:
                self._requests[request.run.uid] = request
            return uids

        def _goes_on(self) -> tuple[Sequence[PromptResponse], Sequence[AnswerResponse]]:
            """A step like the one before: it only writes, and nobody came or left.

            It does as little of its own as can be; what a token costs is here.
            """
            step.begin("decode")
            prompts, generated = super().next()
            self._hand_out(generated)
            if disk is not None:
                disk.confirm()
            return prompts, generated

        def _hand_out(self, generated: Sequence[AnswerResponse]) -> None:
            for response in generated:
                if response.finish_reason is not None:
                    request = self._requests.pop(response.uid, None)
                else:
                    request = self._requests.get(response.uid)
                if request is not None:
                    numbers.token(request, response)

        def _never_inserted(self) -> tuple[Uid]:
            """A uid for a request that failed here; the next turn removes it."""
            self._missing.add(uid := f"never inserted {len(self._missing)}")
            return (uid,)

        def remove(
            self, uids: Sequence[Uid], *args: object, **kwargs: object
        ) -> object:
            for uid in uids:
                self._requests.pop(uid, None)
            uids = [uid for uid in uids if uid not in self._missing]
            return super().remove(uids, *args, **kwargs)

        def next(self) -> tuple[Sequence[PromptResponse], Sequence[AnswerResponse]]:
            if self._leaving:
                self._leaving = self._has_stepped = False
                return [], []
            if self._has_stepped and is_awaited():
                self._has_stepped = False
                return [], []
            self._has_stepped = True
            if scheduler.goes_on():
                return self._goes_on()
            leaving = [uid for uid, r in self._requests.items() if r.is_ended]
            _reports.sample_memory()
            unchanged = scheduler.is_unchanged
            leaving = leaving or [r.run.uid for r in scheduler.step()]
            if leaving:
                self._leaving = True
                return [_Nothing(uid) for uid in leaving], []
            if disk is not None:
                # Here too: mlx-lm's loop asks for work twice a second only.
                disk.confirm()
            observer().begin(unchanged)
            reading = [
                r for r in self._requests.values() if r.state is RequestState.PREFILL
            ]
            if reading:
                prefill.fit(min(len(reading), self.prefill_batch_size), probe=PROBE)
                prefill.reads(_narrow(self))
            step.begin("prefill" if reading else "decode")
            prompts, generated = super().next()
            running = step.running if prompts else None
            if disk is not None:
                for prompt in prompts:
                    request = self._requests.get(prompt.uid)
                    if request is not None:
                        disk.checkpoint(
                            self,
                            prompt.uid,
                            request,
                            is_boundary=prompt.end_of_segment,
                        )
            self._hand_out(generated)
            if any(not response.end_of_prompt for response in prompts):
                prefill.went_well()
            if prompts and running is not None:
                prefill.took(self._read.tokens(prompts), running[1])
            observer().end_of_batch_step(prompts, generated, scheduler.prompt_lengths)
            return prompts, generated

    Watched.__name__ = cls.__name__
    return Watched


@dataclass
class _Nothing:
    """A `PromptResponse` of a prompt that was not read any further."""

    uid: Uid
    progress: tuple[int, int] = (0, 0)
    end_of_segment: bool = False
    end_of_prompt: bool = False
