"""Notices that a rank is gone: by connections on which nothing is sent.

Each of the others has one to the first rank. When a process ends, however it does, the
system closes its connections, and the other end hears of it within milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Lifeline", "address_of_first"]

log = logging.getLogger("mlx_safe.server")

# For all ranks, which have met already; for one connection to say who it is.
CONNECT_S = 30.0
GREETING_S = 2.0
LOOK_EVERY_S = 0.1
# A rank says with it who it is: a stranger does not know the secret.
GREETING = struct.Struct("!iii")
# For a host that is gone without a word: asked after so many idle seconds, as often.
# TCP_KEEPALIVE: macOS's name of TCP_KEEPIDLE.
KEEPALIVE = (
    ("TCP_KEEPIDLE", 5),
    ("TCP_KEEPALIVE", 5),
    ("TCP_KEEPINTVL", 2),
    ("TCP_KEEPCNT", 3),
)


def address_of_first() -> str | None:
    """The host of the first rank, as mlx.launch tells it (0.31 to 0.32).

    By what it sets for NCCL, JACCL and the ring; None for MPI, which has its own way.
    """
    if os.environ.get("NCCL_HOST_IP"):
        return os.environ["NCCL_HOST_IP"]
    if os.environ.get("MLX_JACCL_COORDINATOR"):
        return os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    try:
        first = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())[0]
        first = first[0] if isinstance(first, list) else first
        return str(first).rpartition(":")[0] or None
    except (KeyError, OSError, ValueError, IndexError):
        return None


class _Caller:
    """A connection that has been accepted, and has not said yet who it is."""

    def __init__(self, listener: socket.socket) -> None:
        self.connection, self._address = listener.accept()
        self.connection.setblocking(False)
        self.until = time.monotonic() + GREETING_S
        self._said = b""

    def listen(self) -> bool:
        """Takes what it says; whether that is all, or there will be no more."""
        try:
            got = self.connection.recv(GREETING.size - len(self._said))
        except BlockingIOError:
            return False
        except OSError:
            got = b""
        self._said += got
        return not got or len(self._said) == GREETING.size

    def rank(self, secret: list[int]) -> int:
        """Which rank it is; 0: none."""
        if len(self._said) < GREETING.size:
            return 0
        *found, rank = GREETING.unpack(self._said)
        return int(rank) if found == secret else 0

    def turn_away(self) -> None:
        host = self._address[0]
        log.warning(
            "refused a connection from %s to the ranks: it is not from a rank", host
        )
        self.connection.close()


def _callers(selector: selectors.BaseSelector) -> list[_Caller]:
    return [key.data for key in selector.get_map().values() if key.data is not None]


class Lifeline:
    """The connections of one rank.

    Args:
        rank, size: of the group.
        address: the first rank's host.
        share: the sum of a list of numbers (31 bits) over all ranks; called once by
            each, on the thread that makes this.

    Raises:
        OSError: the ranks cannot reach each other; some may have connected.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        share: Callable[[list[int]], list[int]],
    ) -> None:
        self._ended = False
        self._peers: dict[int, socket.socket] = {}
        if rank == 0:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server((address, 0), family=family) as listener:
                secret = [secrets.randbits(31), secrets.randbits(31)]
                share([listener.getsockname()[1], *secret])
                self._accept(listener, size, secret)
        else:
            port, *secret = share([0, 0, 0])
            connection = socket.create_connection((address, port), CONNECT_S)
            connection.sendall(GREETING.pack(*secret, rank))
            self._keep(0, connection)

    def _accept(self, listener: socket.socket, size: int, secret: list[int]) -> None:
        """Waits until all the others have said who they are; no stranger holds it up.

        Raises:
            TimeoutError: some have not come.
        """
        missing = set(range(1, size))
        deadline = time.monotonic() + CONNECT_S
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while missing:
                ready = [key.data for key, _ in selector.select(LOOK_EVERY_S)]
                if None in ready:
                    caller = _Caller(listener)
                    selector.register(caller.connection, selectors.EVENT_READ, caller)
                now = time.monotonic()
                for caller in _callers(selector):
                    has_spoken = caller in ready and caller.listen()
                    if not has_spoken and now < caller.until:
                        continue
                    selector.unregister(caller.connection)
                    rank = caller.rank(secret)
                    if rank in missing:
                        missing.remove(rank)
                        self._keep(rank, caller.connection)
                    else:
                        caller.turn_away()
                if missing and now >= deadline:
                    raise TimeoutError(f"ranks did not connect: {sorted(missing)}")
            for caller in _callers(selector):
                caller.turn_away()

    def _keep(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[rank] = connection

    def watch(self, lost: Callable[[int], object]) -> None:
        """Has ``lost`` called with the rank that is gone, on a thread of our own.

        Once, and not after `end`.
        """
        threading.Thread(
            target=self._watch, args=(lost,), name="mlx-safe-lifeline", daemon=True
        ).start()

    def end(self) -> None:
        """From now on ranks may end."""
        self._ended = True

    def _watch(self, lost: Callable[[int], object]) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            # Nobody sends anything: what there is to read is the end.
            rank = selector.select()[0][0].data
        if not self._ended:
            lost(rank)
