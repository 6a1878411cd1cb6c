"""Clients that leave while they wait, noticed without writing to them.

mlx-lm notices on the next write: never in a long prefill of the sequential path,
and only at the end of an answer that is not streamed. One thread watches the
sockets of all requests in flight instead.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .tickets import Ticket

__all__ = ["Departures"]

# A decode step takes 10 to 100 ms on the machines this is for.
LOOK_EVERY_S = 0.02


class Departures:
    """The connections that are watched. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[socket.socket, Ticket | None] = {}
        self._here = threading.local()
        self._wake = threading.Event()
        threading.Thread(
            target=self._run, name="mlx-safe-departures", daemon=True
        ).start()

    @contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """Held by a handler, on its thread, while its client waits."""
        self._here.connection = connection
        with self._lock:
            self._watched[connection] = None
        try:
            yield
        finally:
            self._here.connection = None
            with self._lock:
                self._watched.pop(connection, None)

    def bind(self, ticket: Ticket | None) -> None:
        """Names the request of this thread's client; from now on it is watched."""
        connection = getattr(self._here, "connection", None)
        if connection is None or ticket is None:
            return
        with self._lock:
            if connection in self._watched:
                self._watched[connection] = ticket
        self._wake.set()

    def ticket(self, connection: socket.socket) -> Ticket | None:
        """The request that was named for ``connection``."""
        with self._lock:
            return self._watched.get(connection)

    def _run(self) -> None:
        while True:
            with self._lock:
                watched = {c: t for c, t in self._watched.items() if t is not None}
            if not watched:
                self._wake.wait()
                self._wake.clear()
                continue
            for connection, ticket in watched.items():
                if _has_left(connection):
                    ticket.leave()
                    with self._lock:
                        self._watched.pop(connection, None)
            time.sleep(LOOK_EVERY_S)


def _has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed; data that it sent on is left alone."""
    try:
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        if not poller.poll(0):
            return False
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True  # reset, or closed by its own handler
