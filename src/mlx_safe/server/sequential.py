"""mlx-lm's sequential path, which works on one request alone, looked at between steps.

Used by the generation thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from .headroom import STEPS_MAX, Headroom
from .in_flight import InFlight
from .mlx_lm.protocols.opaque import (
    Item,
)
from .prefill import TELLING, PrefillStep
from .prompts import Held
from .replies import NotEnoughMemory
from .request import Disconnected
from .scheduler import Scheduler
from .step import Step

__all__ = ["Sequential"]

# How often ranks agree whether the client is still there.
SHARE_EVERY_TOKENS = 16


class Sequential:
    """What happens before the path passes on a token, or how far a prompt is read.

    mlx-lm looks for clients that left after a token only, and never at the memory. The
    batched path is looked at by `batches`: an exception would end the batch.

    Args:
        share: mlx-lm's ``_share_object``; None: there is one rank.
    """

    def __init__(
        self,
        scheduler: Scheduler[InFlight],
        headroom: Headroom,
        share: Callable[[object], object] | None,
        prefill: PrefillStep,
        step: Step,
    ) -> None:
        self._scheduler = scheduler
        self._headroom = headroom
        self._share = share
        self._prefill = prefill
        self._step = step
        self._tokens = 0  # of this run
        self._until_look = 0  # tokens, until memory is looked at again
        self._size = 0  # of the steps of this run, which mlx-lm has fixed

    def begin(self) -> None:
        """mlx-lm is about to work on a request alone."""
        share, self._tokens = self._share, 0
        # All ranks read the whole prompt so: in the shortest steps it would take long.
        self._size = (
            self._prefill.agree(share, probe=TELLING) if share else self._prefill.fit()
        )
        self._until_look = 0
        self._step.begin("prefill")

    def before_put(self, request: InFlight, item: Item) -> None:
        """A step was done, and mlx-lm puts ``item`` for the client.

        Raises:
            Disconnected: the client has left.
            Held: it goes on with smaller steps.
            NotEnoughMemory: it cannot go on.
        """
        if self._has_left(request, item):
            raise Disconnected("the client left during the step")
        is_slow = isinstance(item, tuple) and self._is_slow(request, *item)
        left = item[1] - item[0] if isinstance(item, tuple) else 0  # of its prompt
        self._look_at_memory(request, item, left > 0)
        if left > 0:
            self._prefill.reads(min(self._prefill.size, left))
        if is_slow:
            self._scheduler.read_slowly(request)
            raise Held
        self._step.begin("prefill" if left > 0 else "decode")

    def between_steps(
        self, request: InFlight, done: int, total: int, by_target: bool
    ) -> None:
        """With a draft model: the same, of a prompt that both read.

        Memory is not looked at: what it learns is of one model's caches.

        Raises:
            Disconnected, Held: as `before_put`.
        """
        if self._has_left(request, ()):
            raise Disconnected("the client left during the step")
        if self._is_slow(request, done, total, by_target):
            self._scheduler.read_slowly(request)
            raise Held
        self._step.begin("prefill" if done < total else "decode")

    def _is_slow(
        self, request: InFlight, done: int, total: int, by_target: bool = True
    ) -> bool:
        """Whether the rest of its prompt is to be read in smaller steps.

        What has been read is read again then, so it must be worth it. It happens once
        or twice to a model, as the next request begins with what was learned.
        """
        running = self._step.running
        tokens = done - request.prompt_read[0]
        if running is None or tokens <= 0:
            return False
        self._prefill.took(tokens, running[1], at_least=not by_target)
        if self._share:  # with several ranks it goes on as it was begun
            return False
        size = self._prefill.fit()
        # Once more only where it is far too long: a busy machine is no slow model.
        most = self._prefill.aim_s * (1 if request.step_max is None else 4)
        is_long = bool(most) and running[1] > most
        return is_long and 2 * size <= self._size and total - done > size

    def _look_at_memory(self, request: InFlight, item: Item, reads: bool) -> None:
        length = None if self._share else _length(request, item)
        if length is None:
            return
        if hasattr(item, "token"):
            # What is asked for is a block of the caches, as for a batch.
            self._until_look -= 1
            if self._until_look > 0:
                return
            self._until_look = STEPS_MAX
        with self._headroom.observing_step(request.run.length, length):
            found = self._scheduler.single_step(request, length, reads)
            if found == "smaller":
                raise Held
            if found == "none":
                raise NotEnoughMemory("there is no memory for the next step")

    def _has_left(self, request: InFlight, item: Item) -> bool:
        """Whether the client is gone; with more than one rank, as all ranks see it.

        Only the first rank knows, and sharing waits for the step that is under way:
        it is done for each piece of the prompt, but not for each token.
        """
        if self._share is None:
            return request.is_ended
        # Counted here: one that has ended on the first rank gets no more tokens there.
        self._tokens += hasattr(item, "token")
        if self._tokens % SHARE_EVERY_TOKENS:
            return False
        return bool(self._share(request.is_ended or None))


def _length(request: InFlight, item: Item) -> int | None:
    """Tokens in the caches when mlx-lm puts ``item``; None: that tells nothing."""
    if request.claim is None:
        return None
    if isinstance(item, tuple):
        done, total = item
        return int(request.claim.prompt - total + done)
    return request.next_length if hasattr(item, "token") else None
