"""The requests that the generation thread has taken and not yet answered.

mlx-lm gives each request a queue and, from its generation thread, puts on it:
a ``GenerationContext``, then any number of (done, total) progress tuples and
``Response`` objects, and at the end None or an exception. A `Ticket` stands in
for that queue, so it sees all of it, on the batched and the sequential path and
in every supported version, without a look into mlx-lm's frames. It knows which
tokens the client has, and so the request can be run again from there.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from .recorder import Place

__all__ = ["Claim", "ClientLeft", "Flight", "Ticket", "ticket_of"]

_ATTRIBUTE = "_mlx_safe_ticket"


def ticket_of(request: Any) -> Ticket | None:
    """The ticket of a request that `Ticket.work` gave out."""
    found: Ticket | None = getattr(request, _ATTRIBUTE, None)
    return found


class ClientLeft(ConnectionError):
    """The client of a request closed its connection."""


@dataclasses.dataclass
class Claim:
    """What a request said of itself when it asked to be admitted.

    Attributes:
        prompt: tokens of its prompt, those among them that it produced before
            it was interrupted. total: with those that it may still generate.
        produced: tokens that its client had by then.
        deadline: monotonic seconds until which it may wait for memory.
    """

    prompt: int
    total: int
    produced: int
    deadline: float


class Ticket:
    """One request in flight; has the ``put`` of the queue it stands for.

    ``put`` and `work` are called by the generation thread only, `fail` by any.

    Attributes:
        produced: ids of the tokens that were passed on to the client.
        attempts: how often it was run again after a fault.
        begun: mlx-lm has begun with it, this time; before, it may wait until a
            batch has ended that it cannot join.
        finished: its last token was passed on.
        may_be_stopped: False: its context is left alone when it ends early.
        headers: HTTP headers that go with the answer.
        claim: what it asked to be admitted with; None before.
        held: it waits for memory, and mlx-lm does not have it.
        prompt_key: (model, tokens), as the prompt cache knows its prompt.
        tokenizer: that its prompt was read with; its handler has it with the context.
        uid: mlx-lm's, in its batch. owned: bytes of the prompt-cache entry that
            it took over. step_max: its prompt is read in steps of at most so
            many tokens; None: as may be.
    """

    def __init__(
        self,
        flight: Flight,
        taken: tuple[Any, Any, Any],
        before_put: Callable[[Ticket, Any], None],
        on_error: Callable[[Ticket, Exception], None],
    ) -> None:
        self._flight = flight
        self._queue, request, self._args = taken
        # mlx-lm changes the messages while it reads them.
        self._request = copy.deepcopy(request)
        self._before_put = before_put
        self._on_error = on_error
        # The first context goes to the client's handler, which keeps it; the
        # last one is the generation's.
        self.context: Any = None
        self._stopped = False
        self.produced: list[int] = []
        self.attempts = 0
        self.begun = False
        self.finished = False
        self.may_be_stopped = True
        self.headers: dict[str, str] = {}
        # How many tokens of this run the client has already.
        self._repeated = 0
        self._place = Place(request)
        self.claim: Claim | None = None
        self.held = False
        self.prompt_key: tuple[Any, list[Any]] | None = None
        self.tokenizer: Any = None
        self.uid: Any = None
        self.owned = 0
        self.step_max: int | None = None

    @property
    def is_reading(self) -> bool:
        """Its prompt has not been read to the end since it was admitted."""
        return self.claim is not None and len(self.produced) == self.claim.produced

    @property
    def length(self) -> int:
        """Tokens that its caches have, or will have when its prompt is read."""
        if self.claim is None:
            return 0
        return self.claim.prompt + len(self.produced) - self.claim.produced

    @property
    def stopped(self) -> bool:
        """The client has left, or has its answer."""
        return self._stopped

    def begin_again(self) -> None:
        """This run makes the answer from its first token, the client's included."""
        self._repeated = len(self.produced)

    def work(self) -> tuple[Ticket, Any, Any]:
        """What mlx-lm is to do: the request, or the rest of it."""
        self._repeated = 0
        self.begun = False
        request = copy.deepcopy(self._request)
        setattr(request, _ATTRIBUTE, self)
        args = dataclasses.replace(
            self._args, max_tokens=self._args.max_tokens - len(self.produced)
        )
        return self, request, args

    def put(self, item: Any) -> None:
        """Passes ``item`` on, unless a fault has made it worthless.

        Raises:
            GPUError: there was a fault since the last reset: what this step
                computed may be garbage.
            ClientLeft: nobody waits for it any more (sequential path only).
        """
        if isinstance(item, Exception):
            # mlx-lm's sequential path ends a request so.
            self.begun = True
            self._on_error(self, item)
            return
        self._before_put(self, item)
        if item is None:
            self.complete()
        elif isinstance(item, tuple):
            self._place.prefilled(*item)
            if not self.held:
                self._queue.put(item)
        elif hasattr(item, "token") and self._repeated:
            self._repeated -= 1
        elif hasattr(item, "token"):
            self.produced.append(item.token)
            self.finished = item.finish_reason is not None
            self._flight.tokens += 1
            self._place.produced(len(self.produced))
            self._queue.put(item)
        else:
            self._begin(item)

    def _begin(self, context: Any) -> None:
        """A handler that is done, or whose client left, stops its context."""
        first = self.context is None
        self.context = context
        self.begun = True
        self._place.begun(len(context.prompt))
        if self._stopped:  # its client left while the prompt was tokenized
            self._stop()
        if not first:
            return

        def stopped() -> None:
            self._stop()
            self._land("ended")

        context.stop = stopped
        context.tokenizer = self.tokenizer
        self._queue.put(context)

    def _stop(self) -> None:
        self._stopped = True
        if self.context is not None and self.may_be_stopped:
            type(self.context).stop(self.context)

    def interrupt(self) -> None:
        """Makes mlx-lm drop it; it may be given out again by `work`."""
        if self.context is not None:
            type(self.context).stop(self.context)

    def leave(self) -> None:
        """The client went away: ends the request. Any thread."""
        self.fail(ClientLeft("the client closed the connection"))

    def complete(self) -> None:
        """Ends the request as mlx-lm does."""
        if self._land("completed"):
            self._queue.put(None)

    def fail(self, exc: Exception) -> bool:
        """Ends the request with ``exc``; False when it had ended already."""
        self._stop()  # first: one that is in flight no more makes no more steps
        if not self._land(f"failed: {type(exc).__name__}"):
            return False
        # A copy: each client's thread raises its own.
        self._queue.put(copy.copy(exc))
        return True

    def _land(self, how: str) -> bool:
        landed = self._flight.land(self)
        if landed:
            self._place.ended(len(self.produced), how)
        return landed


class Flight:
    """All tickets that are open. Thread-safe.

    Attributes:
        tokens: tokens passed on to any client so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Ticket] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._open)

    def board(self, ticket: Ticket) -> None:
        """Adds a ticket."""
        with self._lock:
            self._open.append(ticket)

    def land(self, ticket: Ticket) -> bool:
        """Removes a ticket; False when it was not open any more."""
        with self._lock:
            if ticket not in self._open:
                return False
            self._open.remove(ticket)
            return True

    def tickets(self) -> list[Ticket]:
        """Those open now, oldest first."""
        with self._lock:
            return list(self._open)

    def running(self) -> list[Ticket]:
        """Those of them that do not wait for memory."""
        return [ticket for ticket in self.tickets() if not ticket.held]
