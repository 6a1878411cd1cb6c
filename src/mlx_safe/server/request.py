"""One request in flight: its state, and what is known of its run.

The table of `TRANSITIONS` is the whole life of a request, checked at every change.
``python -m mlx_safe.server.request`` prints it as the diagram in ARCHITECTURE.md.
Only `scheduler` changes a state, or another attribute that `Request` has here.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mlx_lm.protocols.opaque import Item, Uid

__all__ = [
    "BEFORE_PREFILL",
    "ENDED",
    "RUNNING",
    "SUSPECT_FROM",
    "TRANSITIONS",
    "Claim",
    "Disconnected",
    "IllegalTransition",
    "Request",
    "RequestState",
    "Run",
    "diagram",
]


class RequestState(enum.Enum):
    """Where a request is."""

    QUEUED = "queued"
    """It has come; the generation thread has not taken it."""
    WAITING = "waiting"
    """mlx-lm has it and has not begun with it: a batch may have to end first."""
    HELD = "held"
    """It waits for memory; mlx-lm does not have it."""
    PREFILL = "prefill"
    """It has its memory; its prompt is being read."""
    DECODE = "decode"
    """Its answer is being made, token by token."""
    FINISHED = "finished"
    """Its last token was passed on."""
    REPLAY = "replay"
    """A failure interrupted it, or the process's end; it waits to be run again."""
    COMPLETED = "completed"
    FAILED = "failed"
    DISCONNECTED = "disconnected"
    """Nobody waits for its answer any more."""

    # By identity, as members are unique; `Enum` hashes the name, in Python.
    __hash__ = object.__hash__


_S = RequestState
RUNNING = (_S.PREFILL, _S.DECODE, _S.FINISHED)
BEFORE_PREFILL = (_S.QUEUED, _S.WAITING, _S.HELD, _S.REPLAY)
ENDED = (_S.COMPLETED, _S.FAILED, _S.DISCONNECTED)
# When so many processes have died while they worked on a request it is run alone: that
# tells whether it is what ends them, or another of its batch.
SUSPECT_FROM = 2

TRANSITIONS: dict[tuple[RequestState, RequestState], str] = {
    (_S.QUEUED, _S.WAITING): "taken",
    (_S.QUEUED, _S.REPLAY): "suspect",
    (_S.WAITING, _S.PREFILL): "admitted",
    (_S.WAITING, _S.HELD): "no memory yet",
    (_S.WAITING, _S.REPLAY): "failure",
    (_S.HELD, _S.WAITING): "its turn",
    (_S.PREFILL, _S.DECODE): "first token",
    (_S.PREFILL, _S.HELD): "preempted",
    (_S.PREFILL, _S.REPLAY): "failure",
    (_S.DECODE, _S.FINISHED): "last token",
    (_S.DECODE, _S.HELD): "preempted",
    (_S.DECODE, _S.REPLAY): "failure",
    (_S.REPLAY, _S.WAITING): "its turn",
    # mlx-lm may end a request without a last token.
    (_S.PREFILL, _S.COMPLETED): "end",
    (_S.DECODE, _S.COMPLETED): "end",
    (_S.FINISHED, _S.COMPLETED): "end",
    **{(s, _S.FAILED): "error" for s in _S if s not in ENDED},
    **{(s, _S.DISCONNECTED): "client left" for s in _S if s not in ENDED},
}


class IllegalTransition(RuntimeError):
    """A state was to be changed to one that the table does not lead to."""


class Disconnected(ConnectionError):
    """The client of a request closed its connection."""


@dataclass(frozen=True)
class Claim:
    """What a request said of itself when it asked for memory.

    Attributes:
        prompt: tokens of its prompt, those among them that it produced before
            it was interrupted. total: with those that it may still generate.
        deadline: monotonic seconds until which it may wait for memory.
    """

    prompt: int
    total: int
    deadline: float


@dataclass
class Run:
    """What is known of a request's present run at mlx-lm; a new one for each.

    Attributes:
        alone: mlx-lm's sequential path works on it. uid: mlx-lm's, in its batch.
        takes_over: the prompt-cache entry that it begins from becomes its own.
        owned: bytes of that entry.
        length: tokens that its caches have, on the sequential path.
        failed: mlx-lm has failed to begin with it.
        made: tokens that came of it. repeated: how many are still to come that the
            client has already.
    """

    alone: bool = False
    uid: Uid | None = None
    takes_over: bool = False
    owned: int = 0
    length: int = 0
    failed: bool = False
    made: int = 0
    repeated: int = 0


class Request:
    """One request in flight. Any thread may read it.

    Only the scheduler writes the attributes below. Who knows its client and mlx-lm
    makes a subclass.

    Attributes:
        produced: ids of the tokens that were passed on to the client; inherited: how
            many of them were by an earlier server.
        attempts: how often it was run again after a fault.
        times_replayed: how often it was run again, after whatever failure.
        has_context: its client knows that mlx-lm has begun with it, once.
        claim: what it asked for memory with; None before, and after a failure.
        line: its place in the line for memory, from the first time that it is held
            until it is admitted; None: it has none.
        step_max: its prompt is read in steps of at most so many tokens; None: as
            may be.
        came_at, first_token_at, ended_at: monotonic seconds; None: not yet.
        waits_since: since when it has been in one of `BEFORE_PREFILL`, or was last.
        id, path: what its client knows it by.
        deaths: how many processes died while they worked on it.
        prompt_tokens: of its prompt, and cached_tokens: those of them that were in
            the prompt cache when it was begun first; None: not known yet.
        prompt_read: (tokens, of how many) of what this run has to read of its prompt.
        ended_with: the error; None: it was completed, or goes on.
    """

    id = "-"
    path = "-"
    deaths = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def __init__(self, produced: Sequence[int] = ()) -> None:
        self._state = RequestState.QUEUED
        self.produced = list(produced)
        self.inherited = len(produced)
        self.attempts = 0
        self.times_replayed = 0
        self.came_at: float | None = None
        self.waits_since: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.prompt_read = (0, 0)
        self.ended_with: Exception | None = None
        self.has_context = False
        self.claim: Claim | None = None
        self.line: int | None = None
        self.step_max: int | None = None
        self.run = Run()

    @property
    def state(self) -> RequestState:
        """Where it is now."""
        return self._state

    @property
    def is_ended(self) -> bool:
        """It has its answer, or needs none."""
        return self._state in ENDED

    @property
    def has_begun(self) -> bool:
        """Its client knows so, of this process or of an earlier one."""
        return self.has_context or self.inherited > 0

    @property
    def tokens(self) -> int:
        """How many it has produced in this process."""
        return len(self.produced) - self.inherited

    @property
    def next_length(self) -> int:
        """Tokens that its caches have when the token is made that comes next."""
        return 0 if self.claim is None else self.claim.prompt + self.run.made + 1

    # What the scheduler needs done; the generation thread or, to end it, any.

    def send(self, item: Item) -> None:
        """Passes ``item`` on to the client: None is the end, an exception the error."""
        raise NotImplementedError

    def stop_run(self) -> None:
        """Makes mlx-lm drop it before its next step."""
        raise NotImplementedError

    def note_work(self, does: bool) -> None:
        """The generation thread works on it, or no more: it waits.

        If the process dies meanwhile, it may be why.
        """

    def note_end(self, how: str) -> None:
        """It is in flight no more; ``how`` it ended, for reports."""


def diagram() -> str:
    """`TRANSITIONS` as a state diagram in Mermaid's language.

    What leads out of every state in flight is one arrow.
    """
    alive = [state for state in _S if state not in ENDED]
    everywhere = {
        end: TRANSITIONS[alive[0], end]
        for end in ENDED
        if all((state, end) in TRANSITIONS for state in alive)
    }
    single = {
        pair: why for pair, why in TRANSITIONS.items() if pair[1] not in everywhere
    }
    inner = {pair: why for pair, why in single.items() if pair[1] not in ENDED}
    outer = {pair: why for pair, why in single.items() if pair[1] in ENDED}
    return "\n".join(
        [
            "stateDiagram-v2",
            f"    [*] --> {_S.QUEUED.value}",
            "    state in_flight {",
            *(f"    {line}" for line in map(_arrow, inner.items())),
            "    }",
            *map(_arrow, outer.items()),
            *(f"    in_flight --> {e.value}: {why}" for e, why in everywhere.items()),
            *(f"    {end.value} --> [*]" for end in ENDED),
        ]
    )


def _arrow(transition: tuple[tuple[RequestState, RequestState], str]) -> str:
    (old, new), why = transition
    return f"    {old.value} --> {new.value}: {why}"


if __name__ == "__main__":
    print(diagram())
