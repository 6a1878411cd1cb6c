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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .handover import Held
from .in_flight import InFlight

__all__ = ["Disconnects", "Watch"]


@dataclass(eq=False)
class Watch:
    """One client that waits.

    Attributes:
        request: what the generator has for it; None: nothing yet.
        number: of its socket, from when the generator has the request; -1: none.
    """

    connection: socket.socket
    held: Held
    request: InFlight | None = None
    has_left: bool = False
    number: int = -1


class Disconnects:
    """The connections that are watched, by the id of their request. Thread-safe.

    The thread sleeps until the system says that something happened to one of them: no
    token and no request wakes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._by_number: dict[int, list[Watch]] = {}  # of their sockets
        self._happenings = _Epoll() if hasattr(select, "epoll") else _Kqueue()
        threading.Thread(
            target=self._run, name="mlx-safe-disconnects", daemon=True
        ).start()

    @contextmanager
    def watching(
        self, request_id: str, connection: socket.socket, held: Held
    ) -> Iterator[Watch]:
        """Entered by a handler while its client waits."""
        watch = Watch(connection, held)
        with self._lock:
            self._watches[request_id] = watch
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.pop(request_id, None)
                self._forget(watch)

    def bind(self, request_id: str, request: InFlight) -> None:
        """The generator has the request, in its queue at first; it is watched now."""
        with self._lock:
            watch = self._watches.get(request_id)
            if watch is None:
                return
            watch.request, request.held = request, watch.held
            watch.number = watch.connection.fileno()
            self._by_number.setdefault(watch.number, []).append(watch)
            # Those that are closed already cannot be added, or tell of nothing more.
            with contextlib.suppress(OSError, ValueError):
                self._happenings.add(watch.number)
        self._look(watch.number)

    def request(self, request_id: str | None) -> InFlight | None:
        """What the generator has for it; None: nothing yet, or its client left."""
        with self._lock:
            watch = self._watches.get(request_id) if request_id else None
            return None if watch is None or watch.has_left else watch.request

    def _forget(self, watch: Watch) -> None:
        watches = self._by_number.get(watch.number, [])
        if watch not in watches:
            return
        watches.remove(watch)
        if not watches:
            del self._by_number[watch.number]
            with contextlib.suppress(OSError, ValueError):
                self._happenings.remove(watch.number)

    def _run(self) -> None:
        while True:
            for number in self._happenings.wait():
                self._look(number)

    def _look(self, number: int) -> None:
        """Something may have happened to the socket of that number, or one before."""
        with self._lock:
            watches = self._by_number.get(number, ())
            left = [w for w in watches if not w.has_left and _has_left(w.connection)]
            for watch in left:
                watch.has_left = True
        for watch in left:
            assert watch.request is not None
            watch.request.disconnect()


class _Epoll:
    """Linux: of sockets, by their numbers, when one is closed by its other side."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, number: int) -> None:
        """Watches it from now on: once for each change, also one that came before."""
        with contextlib.suppress(FileExistsError):  # of another choice of its answer
            self._epoll.register(number, select.EPOLLRDHUP | select.EPOLLET)

    def remove(self, number: int) -> None:
        self._epoll.unregister(number)

    def wait(self) -> list[int]:
        """Those to which something has happened."""
        return [number for number, _ in self._epoll.poll()]


class _Kqueue:
    """macOS: the same; data that has come is reported as well."""

    def __init__(self) -> None:
        kq: Any = select  # what only systems with kqueue have
        self._kq = kq
        self._queue = kq.kqueue()

    def add(self, number: int) -> None:
        self._change(number, self._kq.KQ_EV_ADD | self._kq.KQ_EV_CLEAR)

    def remove(self, number: int) -> None:
        self._change(number, self._kq.KQ_EV_DELETE)

    def _change(self, number: int, flags: int) -> None:
        change = self._kq.kevent(number, self._kq.KQ_FILTER_READ, flags)
        self._queue.control([change], 0, 0)

    def wait(self) -> list[int]:
        return [event.ident for event in self._queue.control([], 16, None)]


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
