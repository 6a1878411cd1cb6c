"""How much has gone through a connection, as the system counts it.

Only Linux says so. Others are asked for nothing: -1.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
from collections.abc import Callable

__all__ = ["count_sent", "count_taken"]

# Linux (4.1): where struct tcp_info has the bytes that the other side has
# acknowledged, and those that came in.
ACKNOWLEDGED_AT = 120
RECEIVED_AT = 128


def count_taken(connection: socket.socket) -> int:
    """Bytes taken from ``connection`` since it was made; -1: not known.

    The end of what a client sends is counted as a byte.
    """
    return _count(
        connection, RECEIVED_AT, termios.FIONREAD, lambda came, waiting: came - waiting
    )


def count_sent(connection: socket.socket) -> int:
    """Bytes that were given to ``connection``, sent or still to be; -1: not known.

    Of one that was accepted; one that was made by ``connect`` has one more.
    """
    return _count(
        connection, ACKNOWLEDGED_AT, termios.TIOCOUTQ, lambda acked, left: acked + left
    )


def _count(
    connection: socket.socket, at: int, queue: int, both: Callable[[int, int], int]
) -> int:
    if not hasattr(socket, "TCP_INFO"):
        return -1
    waiting = array.array("i", [0])
    try:
        for _ in range(100):  # until nothing comes or goes meanwhile
            before = _figure(connection, at)
            fcntl.ioctl(connection.fileno(), queue, waiting)
            if before == _figure(connection, at):
                return both(before, waiting[0])
    except (OSError, struct.error):
        pass
    return -1


def _figure(connection: socket.socket, at: int) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, at + 8)
    found: int = struct.unpack_from("=Q", info, at)[0]
    return found
