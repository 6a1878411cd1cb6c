"""The requests that the generation thread has taken and not yet answered.

mlx-lm gives each request a queue and, from its generation thread, puts on it:
a ``GenerationContext``, then any number of (done, total) progress tuples and
``Response`` objects, and at the end None or an exception. A `Ticket` stands in
for that queue, so it sees all of it, on the batched and the sequential path and
in every supported version, without a look into mlx-lm's frames.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Flight", "Ticket"]


class Ticket:
    """One request in flight; has the ``put`` of the queue it stands for.

    ``put`` is called by the generation thread only, `fail` by any thread.

    Attributes:
        tokens: number of tokens passed on so far.
        since: ``time.monotonic()`` when the generation thread took it.
    """

    def __init__(
        self,
        flight: Flight,
        queue: Any,
        before_put: Callable[[], None],
        on_error: Callable[[Ticket, Exception], None],
    ) -> None:
        self._flight = flight
        self._queue = queue
        self._before_put = before_put
        self._on_error = on_error
        self.context: Any = None
        self.tokens = 0
        self.since = time.monotonic()

    def put(self, item: Any) -> None:
        """Passes ``item`` on, unless a fault has made it worthless.

        Raises:
            MetalError: there was a fault since the last reset: what this step
                computed may be garbage.
        """
        if isinstance(item, Exception):
            # mlx-lm's sequential path ends a request so.
            self._on_error(self, item)
            return
        self._before_put()
        if item is None:
            if self._flight.land(self):
                self._queue.put(None)
            return
        if self.context is None:
            self._watch(item)
        elif not isinstance(item, tuple):
            self.tokens += 1
        self._queue.put(item)

    def _watch(self, context: Any) -> None:
        """A handler that is done, or whose client left, stops its context."""
        self.context = context
        stop = context.stop

        def stopped() -> None:
            stop()
            self._flight.land(self)

        context.stop = stopped

    def fail(self, exc: Exception) -> bool:
        """Ends the request with ``exc``; False when it had ended already."""
        if not self._flight.land(self):
            return False
        if self.context is not None:
            self.context.stop()
        # A copy: each client's thread raises its own.
        self._queue.put(copy.copy(exc))
        return True


class Flight:
    """All tickets that are open. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Ticket] = []

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
