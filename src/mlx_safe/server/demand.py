"""What the requests in flight will still need, in the terms of `memory.budget`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..memory.budget import Option
from ..memory.estimate import CacheCost, Transients
from .tickets import Claim, Ticket

__all__ = ["Demand"]

Steps = Callable[[int], Sequence[int]]


class Demand:
    """The law of what a batch of mlx-lm takes.

    Rows of a batch are padded to the longest. A prompt that is read together
    with others is copied once more when the first of them is done (mlx-lm splits
    the batch by copying), and padded where another's segment is longer than its.
    """

    def __init__(self, cost: CacheCost, transients: Transients) -> None:
        self.cost = cost
        self.transients = transients

    def to_the_end(
        self,
        running: Sequence[Ticket],
        held: int,
        steps: Steps,
        new: Claim | None = None,
    ) -> Iterator[Option]:
        """An option for each size of a prefill step: all that is still to come.

        Args:
            running: the requests that run, without the new one.
            held: bytes that their caches have now.
            steps: the sizes to choose from, for so many prompts at once.
            new: the request that asks to be admitted.
        """
        claims = [t.claim for t in running if t.claim is not None]
        reading = [t.claim for t in running if t.claim is not None and t.is_reading]
        if new is not None:
            claims.append(new)
            reading.append(new)
        for size in steps(len(reading)):
            yield self._option(claims, reading, held, size, new)

    def _option(
        self,
        claims: list[Claim],
        reading: list[Claim],
        held: int,
        step: int,
        new: Claim | None,
    ) -> Option:
        longest = max((c.total for c in claims), default=0)
        chunk = min(step, max((c.prompt for c in reading), default=1))
        kv = self.cost.nbytes(longest, rows=len(claims), step=chunk)
        padded = longest + (2 * chunk if len(reading) > 1 else 0)
        most = self.cost.nbytes(padded, rows=len(claims), step=chunk)
        if len(reading) > 1:
            row = max(c.prompt for c in reading) + 2 * chunk
            most += (len(reading) - 1) * self.cost.nbytes(row, step=chunk)
        alone = 0
        kv_alone = 0
        if new is not None:
            kv_alone = self.cost.nbytes(new.total, step=chunk)
            own_chunk = min(step, new.prompt)
            alone = kv_alone + self.transients.predict(own_chunk, new.prompt)
        return Option(
            step=step,
            growth=max(0, most - held) + self._transient(reading, chunk, len(claims)),
            alone=alone,
            kv=kv,
            kv_alone=kv_alone,
        )

    def next_step(
        self, running: Sequence[Ticket], held: int, steps: Steps
    ) -> Iterator[Option]:
        """The same for the next step only: at most a block and a chunk each."""
        ends = self.to_the_end(running, held, steps)
        reading = [t.claim for t in running if t.claim is not None and t.is_reading]
        for end in ends:
            chunk = min(end.step, max((c.prompt for c in reading), default=1))
            grown = len(running) * self.cost.growth(chunk)
            grown += self._transient(reading, chunk, len(running))
            yield Option(end.step, min(end.growth, grown), alone=0)

    def longest(self, room: int, step: int, kv_limit: int | None) -> int:
        """How many tokens a request may have that runs alone in ``room`` bytes."""
        low, high = 0, 2**31 - 1
        while low < high:
            middle = (low + high + 1) // 2
            kv = self.cost.nbytes(middle, step=step)
            fits = kv + self.transients.predict(min(step, middle), middle) <= room
            if fits and (kv_limit is None or kv <= kv_limit):
                low = middle
            else:
                high = middle - 1
        return low

    def _transient(self, reading: list[Claim], chunk: int, rows: int) -> int:
        """Of one step: a chunk of the prompts, or a token of each answer."""
        decode = self.transients.predict(rows, 1)
        if not reading:
            return decode
        context = max(c.prompt for c in reading)
        return max(decode, self.transients.predict(len(reading) * chunk, context))
