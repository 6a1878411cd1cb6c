"""Clients that leave while they wait, noticed without writing to them.

mlx-lm notices on the next write: never in a long prefill of the sequential path,
and only at the end of an answer that is not streamed. One thread watches the
sockets of all requests in flight instead.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .in_flight import InFlight

__all__ = ["Disconnects"]

# A decode step takes 10 to 100 ms on the machines this is for.
LOOK_EVERY_S = 0.02


class Disconnects:
    """The connections that are watched, by the id of their request. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[str, socket.socket] = {}
        self._requests: dict[str, InFlight] = {}
        self._wake = threading.Event()
        threading.Thread(
            target=self._run, name="mlx-safe-disconnects", daemon=True
        ).start()

    @contextmanager
    def watching(self, request_id: str, connection: socket.socket) -> Iterator[None]:
        """Held by a handler while its client waits."""
        with self._lock:
            self._connections[request_id] = connection
        try:
            yield
        finally:
            with self._lock:
                self._connections.pop(request_id, None)
                self._requests.pop(request_id, None)

    def bind(self, request_id: str, request: InFlight) -> None:
        """The generation thread has taken the request; its client is watched now."""
        with self._lock:
            if request_id in self._connections:
                self._requests[request_id] = request
        self._wake.set()

    def request(self, request_id: str | None) -> InFlight | None:
        """What the request was taken as; None before, and when its client left."""
        with self._lock:
            return self._requests.get(request_id) if request_id else None

    def _run(self) -> None:
        while True:
            with self._lock:
                watched = [
                    (n, self._connections[n], t) for n, t in self._requests.items()
                ]
            if not watched:
                self._wake.wait()
                self._wake.clear()
                continue
            for request_id, connection, request in watched:
                if _has_left(connection):
                    request.disconnect()
                    with self._lock:
                        self._requests.pop(request_id, None)
            time.sleep(LOOK_EVERY_S)


# What shows a close behind data that nobody has read, such as a next request: Linux's
# poll has it, kqueue has it on macOS.
RDHUP = getattr(select, "POLLRDHUP", None)


def _has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed; data that it sent on is left alone."""
    try:
        if RDHUP is None:
            return _is_at_its_end(connection)
        poller = select.poll()
        poller.register(connection, RDHUP)
        return bool(poller.poll(0))
    except (OSError, ValueError):
        return True  # reset, or closed by its own handler


def _is_at_its_end(connection: socket.socket) -> bool:
    kq: Any = select  # what only systems with kqueue have
    with contextlib.closing(kq.kqueue()) as queue:
        wanted = kq.kevent(connection, kq.KQ_FILTER_READ, kq.KQ_EV_ADD)
        return any(e.flags & kq.KQ_EV_EOF for e in queue.control([wanted], 1, 0))
