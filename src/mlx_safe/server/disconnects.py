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
from dataclasses import dataclass
from typing import Any

from .in_flight import InFlight

__all__ = ["Disconnects", "Watch"]

# A decode step takes 10 to 100 ms on the machines this is for.
LOOK_EVERY_S = 0.02


@dataclass
class Watch:
    """One client that waits.

    Attributes:
        request: what the generator has for it; None: nothing yet.
    """

    connection: socket.socket
    request: InFlight | None = None
    has_left: bool = False


class Disconnects:
    """The connections that are watched, by the id of their request. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._wake = threading.Event()
        threading.Thread(
            target=self._run, name="mlx-safe-disconnects", daemon=True
        ).start()

    @contextmanager
    def watching(self, request_id: str, connection: socket.socket) -> Iterator[Watch]:
        """Held by a handler while its client waits."""
        watch = Watch(connection)
        with self._lock:
            self._watches[request_id] = watch
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.pop(request_id, None)

    def bind(self, request_id: str, request: InFlight) -> None:
        """The generator has the request, in its queue at first; it is watched now."""
        with self._lock:
            if request_id in self._watches:
                self._watches[request_id].request = request
        self._wake.set()

    def request(self, request_id: str | None) -> InFlight | None:
        """What the generator has for it; None: nothing yet, or its client left."""
        with self._lock:
            watch = self._watches.get(request_id) if request_id else None
            return None if watch is None or watch.has_left else watch.request

    def _run(self) -> None:
        while True:
            with self._lock:
                watched = [
                    (watch, watch.request)
                    for watch in self._watches.values()
                    if watch.request is not None and not watch.has_left
                ]
            if not watched:
                self._wake.wait()
                self._wake.clear()
                continue
            for watch, request in watched:
                if _has_left(watch.connection):
                    watch.has_left = True
                    request.disconnect()
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
