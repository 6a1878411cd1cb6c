"""What requests will still need, and how long they may be: the law of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .budget import Option
from .estimate import CacheCost, Transients

__all__ = ["STEP_MIN", "Demand", "Row", "Steps", "step_sizes"]

# Below so many tokens a step is dominated by what it costs in any case.
STEP_MIN = 64
# Prompts that mlx-lm reads together (--prompt-concurrency), at most.
ROWS = 8

# The sizes of a prefill step to choose from, for so many prompts at once, the
# largest first. Tokens of each of them.
Steps = Callable[[int], Sequence[int]]


def step_sizes(full: int, rows: int = 1) -> list[int]:
    """A step of ``full`` tokens and its halves, `STEP_MIN` tokens of all ``rows``."""
    rows = min(max(rows, 1), ROWS)
    found = [full]
    while found[-1] // 2 * rows >= STEP_MIN:
        found.append(found[-1] // 2)
    return found


@dataclass(frozen=True)
class Row:
    """One request. Tokens.

    Attributes:
        prompt: of its prompt.
        total: with those that it may still generate.
        is_reading: its prompt has not been read to the end.
    """

    prompt: int
    total: int
    is_reading: bool = True


class Demand:
    """The law of what a batch of mlx-lm takes.

    Rows of a batch are padded to the longest. A prompt that is read together
    with others is copied once more when the first of them is done (mlx-lm splits the
    batch by copying). It is padded where another's segment is longer than its.
    """

    def __init__(self, cost: CacheCost, transients: Transients) -> None:
        self.cost = cost
        self.transients = transients

    def to_the_end(
        self, rows: Sequence[Row], held: int, steps: Steps
    ) -> Iterator[Option]:
        """An option for each size of a prefill step: all that is still to come.

        Args:
            rows: the requests that run, and last the one that asks to be admitted.
            held: bytes that their caches have now.
        """
        for step in steps(_reading(rows)):
            yield self.option(rows, held, step)

    def next_step(
        self, rows: Sequence[Row], held: int, steps: Steps
    ) -> Iterator[Option]:
        """The same for the next step only: at most a block and a chunk each."""
        for step in steps(_reading(rows)):
            chunk = _chunk(rows, step)
            grown = len(rows) * self.cost.growth(chunk)
            caches = min(grown, max(0, self._most(rows, chunk) - held))
            growth = caches + self._transient(rows, chunk)
            yield Option(step, growth, least=caches)

    def longest(
        self, room: int, steps: Steps, kv_limit: int | None = None, rows: int = 1
    ) -> int:
        """How many tokens, prompt and answer, each of ``rows`` requests may have.

        The most with which all of them, and nothing else, are admitted in ``room``
        bytes while their prompts are read. 2**31 - 1 when there is no end to it
        (all layers have windows).

        Args:
            kv_limit: what their caches may hold (``--max-active-kv-bytes``).
        """
        step = steps(rows)[-1]
        low, high = 0, 2**31 - 1
        while low < high:
            middle = (low + high + 1) // 2
            found = self.option([Row(middle, middle)] * rows, 0, step)
            if found.growth <= room and (kv_limit is None or found.kv <= kv_limit):
                low = middle
            else:
                high = middle - 1
        return low

    def option(self, rows: Sequence[Row], held: int, step: int) -> Option:
        """What is still to come with prompts read in steps of ``step`` tokens."""
        chunk = _chunk(rows, step)
        longest = max((row.total for row in rows), default=0)
        growth = max(0, self._most(rows, chunk) - held)
        alone = least = kv_alone = 0
        if rows:
            new = rows[-1]
            kv_alone = self.cost.nbytes(new.total, step=chunk)
            own = min(step, new.prompt)
            alone = kv_alone + self.transients.predict(own, new.prompt)
            least = self.cost.at_least(new.total)
        return Option(
            step=step,
            growth=growth + self._transient(rows, chunk),
            alone=alone,
            least=least,
            kv=self.cost.nbytes(longest, rows=len(rows), step=chunk),
            kv_alone=kv_alone,
        )

    def _most(self, rows: Sequence[Row], chunk: int) -> int:
        """What their caches have at most until the last of them has ended."""
        padded = max((row.total for row in rows), default=0)
        reading = _reading(rows)
        if reading < 2:
            return self.cost.nbytes(padded, rows=len(rows), step=chunk)
        most = self.cost.nbytes(padded + 2 * chunk, rows=len(rows), step=chunk)
        row = max(row.prompt for row in rows if row.is_reading) + 2 * chunk
        return most + (reading - 1) * self.cost.nbytes(row, step=chunk)

    def _transient(self, rows: Sequence[Row], chunk: int) -> int:
        """Of one step: a chunk of the prompts, or a token of each answer."""
        decode = self.transients.predict(len(rows), 1)
        reading = _reading(rows)
        if not reading:
            return decode
        context = max(row.prompt for row in rows if row.is_reading)
        return max(decode, self.transients.predict(reading * chunk, context))


def _reading(rows: Sequence[Row]) -> int:
    return sum(row.is_reading for row in rows)


def _chunk(rows: Sequence[Row], step: int) -> int:
    """What a step reads of the longest prompt; 1 when none is read."""
    return min(step, max((row.prompt for row in rows if row.is_reading), default=1))
