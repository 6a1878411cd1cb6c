"""mlx-lm's sequential path, which works on one request alone, looked at between steps.

Used by the generation thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .headroom import Headroom
from .in_flight import InFlight
from .prompts import Held
from .replies import NotEnoughMemory
from .request import Disconnected
from .scheduler import Scheduler

__all__ = ["Sequential"]

# How often ranks agree whether the client is still there.
SHARE_EVERY_TOKENS = 16


class Sequential:
    """What happens before the path passes on a token, or how far a prompt is read.

    mlx-lm looks for clients that left after a token only, and never at the memory. The
    batched path is looked at by `mlx_lm.batches`: an exception would end the batch.

    Args:
        share: mlx-lm's ``_share_object``; None: there is one rank.
    """

    def __init__(
        self,
        scheduler: Scheduler[InFlight],
        headroom: Headroom,
        share: Callable[[Any], Any] | None,
    ) -> None:
        self._scheduler = scheduler
        self._headroom = headroom
        self._share = share

    def before_put(self, request: InFlight, item: Any) -> None:
        """A step was done, and mlx-lm puts ``item`` for the client.

        Raises:
            Disconnected: the client has left.
            Held: it goes on with smaller steps.
            NotEnoughMemory: it cannot go on.
        """
        if self._has_left(request):
            raise Disconnected("the client left during the step")
        length = None if self._share else _length(request, item)
        if length is None:
            return
        with self._headroom.observing_step(request.run.length, length):
            found = self._scheduler.single_step(request, length)
            if found == "smaller":
                raise Held
            if found == "none":
                raise NotEnoughMemory("there is no memory for the next step")

    def _has_left(self, request: InFlight) -> bool:
        """Whether the client is gone; with more than one rank, as all ranks see it.

        Only the first rank knows, and sharing waits for the step that is under way:
        it is done for each piece of the prompt, but not for each token.
        """
        if self._share is None:
            return request.is_ended
        if len(request.produced) % SHARE_EVERY_TOKENS:
            return False
        return bool(self._share(request.is_ended or None))


def _length(request: InFlight, item: Any) -> int | None:
    """Tokens in the caches when mlx-lm puts ``item``; None: that tells nothing."""
    if request.claim is None:
        return None
    if isinstance(item, tuple):
        done, total = item
        return int(request.claim.prompt - total + done)
    return request.next_length if hasattr(item, "token") else None
