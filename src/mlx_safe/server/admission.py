"""Whether a request may run, and whether a step fits: pure functions of numbers.

What runs and how things stand go in, a `Decision` comes out; `headroom` looks at the
machine before and carries the decision out after. The rule for one option is
`memory.budget.decide`; here is what a server asks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..memory.budget import Decision, Option, Situation, decide
from ..memory.demand import Demand, Row, Steps

__all__ = [
    "Ask",
    "Load",
    "SingleStep",
    "for_request",
    "for_single_step",
    "for_step",
    "for_store",
]

# Of the next step of the sequential path: it fits; its prompt must be read in smaller
# ones from now on; it does not fit.
SingleStep = Literal["fits", "smaller", "none"]


@dataclass(frozen=True)
class Ask:
    """A request that asks for memory.

    Attributes:
        prompt: tokens of its prompt. total: with those that it may still generate.
        reusable: bytes of the prompt-cache entry that it would begin from.
        ahead: how many run, or will run before it.
        begun: its client knows that it has begun.
        may_wait: it has time left.
        step_max: its prompt is read in steps of at most so many tokens; None: any.
    """

    prompt: int
    total: int
    reusable: int = 0
    ahead: int = 0
    begun: bool = False
    may_wait: bool = True
    step_max: int | None = None


@dataclass(frozen=True)
class Load:
    """What runs.

    Attributes:
        rows: the requests, those that came first before the others.
        owned: bytes of the prompt-cache entry that each has taken over, by its uid in
            the batch.
        length: tokens in the caches of the sequential path; 0 without one.
        held: bytes of all their caches.
    """

    rows: tuple[Row, ...] = ()
    owned: Mapping[object, int] = field(default_factory=dict)
    length: int = 0
    held: int = 0


def for_request(
    demand: Demand, now: Situation, load: Load, ask: Ask, steps: Steps, room: int
) -> Decision:
    """Whether a request may run beside ``load``.

    Args:
        steps: the sizes of a prefill step to choose from.
        room: tokens of a request that there is always room for, if it is alone.
    """

    def sizes(rows: int) -> Sequence[int]:
        found = steps(rows)
        most = ask.step_max
        return [n for n in found if most is None or n <= most] or found[-1:]

    options = demand.to_the_end(
        [*load.rows, Row(ask.prompt, ask.total)], load.held, sizes
    )
    now = replace(
        now,
        evictable=max(0, now.evictable - ask.reusable),
        reusable=ask.reusable,
        running=ask.ahead,
        may_wait=ask.may_wait,
        # What had begun, and what the log said there is room for.
        promised=ask.begun or ask.total <= room,
        alone=not load.rows,
    )
    return decide(now, options)


def for_step(demand: Demand, now: Situation, load: Load, steps: Steps) -> Decision:
    """Whether the next step of ``load`` fits, with prompts read in one of ``steps``.

    One request that is alone was let in, and goes on as long as there is room for what
    it holds; an estimate does not end it.
    """
    alone = len(load.rows) == 1
    return _step(demand, now, load, steps, alone)


def for_single_step(
    demand: Demand, now: Situation, load: Load, size: int, steps: Steps
) -> Decision:
    """The same of the sequential path, which reads its prompt in steps of ``size``.

    When that is too much, a ``step`` less than ``size`` says with what it would fit.
    """
    found = _step(demand, now, load, lambda rows: [size], alone=False)
    if found.verdict == "admit":
        return found
    # Only of a prompt: an answer has steps of one token.
    is_reading = any(row.is_reading for row in load.rows)
    smaller = [n for n in steps(1) if n < size] if is_reading else []
    return _step(demand, now, load, lambda rows: smaller or [size], alone=True)


def for_store(
    demand: Demand, now: Situation, load: Load, step: int, size: int, given: int
) -> Decision:
    """Whether the prompt cache may have ``size`` bytes more, beside the next step.

    Args:
        given: bytes of its entries that go for it in any case.
    """
    (option,) = demand.next_step(load.rows, load.held, lambda rows: [step])
    now = replace(
        now, active=now.active - given, evictable=max(0, now.evictable - given)
    )
    return decide(now, [Option(option.step, option.growth + size)])


def _step(
    demand: Demand, now: Situation, load: Load, steps: Steps, alone: bool
) -> Decision:
    options = demand.next_step(load.rows, load.held, steps)
    if now.alone != alone:
        now = replace(now, alone=alone)
    return decide(now, options)
