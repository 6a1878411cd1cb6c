"""What a server has read of a request, in a file that outlives it.

The file has no name. It begins with `HEAD`; then come the bytes of the request. The
server writes it, and the supervisor has it as well. The server may be killed in the
midst of any call. What the file says and what is still in the connection are then
together what the client has sent, without a gap and with nothing twice.

For that a piece is looked at, written here, announced, and only then taken from the
connection. If the server dies between the last two it is asked for: `settle`.
"""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import os
import socket
import struct
import tempfile
import termios

__all__ = ["RequestFile", "State"]

# State; how many servers died while they worked on the request. Then bytes: of the
# piece being taken, of the request before it, and those taken from the connection in
# all.
HEAD = struct.Struct("=BBIQQ")
PIECE = 1 << 16
# Linux (4.1): struct tcp_info has the bytes that came in, at 128.
RECEIVED_AT = 128


class State(enum.IntEnum):
    """How far the request of a connection is."""

    READING = 0  # or waited for; or all of it is there, and it waits for its turn
    RUNNING = 1  # the generation thread works on it, nothing of its answer was sent
    BEGUN = 2


class RequestFile:
    """One such file; ``fd`` is its owner's. Not thread-safe.

    Attributes:
        state, deaths, size: as in `HEAD`, when it was opened or by its own writes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        head = HEAD.unpack(os.pread(fd, HEAD.size, 0))
        state, self.deaths, self._moving, self.size, self._total = head
        self.state = State(state)

    @classmethod
    def make(cls) -> RequestFile:
        """Of a connection of which nothing was read; in memory where that can be."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("mlx-safe-request")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.write(fd, bytes(HEAD.size))
        return cls(fd)

    def close(self) -> None:
        """Gives this process's descriptor back; the file lives on elsewhere."""
        os.close(self.fd)

    def read(self, count: int | None = None) -> bytes:
        """The first ``count`` bytes of the request; None: all of them."""
        count = self.size if count is None else min(count, self.size)
        return os.pread(self.fd, count, HEAD.size)

    def _write_head(self) -> None:
        head = self.state, self.deaths, self._moving, self.size, self._total
        os.pwrite(self.fd, HEAD.pack(*head), 0)

    # -- by a server ---------------------------------------------------------------

    def add(self, data: bytes | memoryview) -> None:
        """``data`` was taken already. Raises OSError when the disk is full."""
        self._append(data)
        self.size += len(data)
        self._write_head()

    def _append(self, data: bytes | memoryview) -> None:
        at = HEAD.size + self.size
        while data:
            count = os.pwrite(self.fd, data, at)
            at, data = at + count, data[count:]

    def receive(self, connection: socket.socket, buffer: memoryview) -> int:
        """Reads from ``connection`` into ``buffer``, as ``recv_into`` does."""
        if self.state is State.BEGUN:  # it is not needed any more
            count = connection.recv_into(buffer)
            self._total += count
            return count
        buffer = buffer[:PIECE]
        count = connection.recv_into(buffer, 0, socket.MSG_PEEK)
        piece = buffer[:count]
        try:
            self._append(piece)
        except OSError:  # a full disk: a part of it cannot be run again
            self.reach(State.BEGUN)
            return self.receive(connection, buffer)
        self._moving = count
        self._write_head()
        while piece:
            piece = piece[connection.recv_into(piece) :]
        self._taken()
        return count

    def _taken(self) -> None:
        self.size += self._moving
        self._total += self._moving
        self._moving = 0
        self._write_head()

    def reach(self, state: State) -> None:
        """The request is so far."""
        self.state = state
        self._write_head()
        if state is State.BEGUN:  # what was read of it is not needed any more
            os.ftruncate(self.fd, HEAD.size)

    def next(self, ahead: bytes) -> None:
        """Another request begins, with ``ahead``, which was read already."""
        os.ftruncate(self.fd, HEAD.size)
        self.state, self.deaths, self.size = State.READING, 0, 0
        try:
            self.add(ahead)
        except OSError:  # as in `receive`
            self.reach(State.BEGUN)

    # -- by the supervisor ---------------------------------------------------------

    def settle(self, connection: socket.socket) -> None:
        """The server is dead: what it had not begun is `State.READING` again."""
        if self.state is State.BEGUN:
            return
        if self._moving:
            piece = os.pread(self.fd, self._moving, HEAD.size + self.size)
            if _was_taken(connection, self._total, piece):
                self._taken()
        self._moving = 0
        self.deaths += self.state is State.RUNNING
        self.state = State.READING
        self._write_head()


def _was_taken(connection: socket.socket, total: int, piece: bytes) -> bool:
    """Whether ``piece`` was taken from ``connection``, after ``total`` bytes."""
    more = _count_taken(connection) - total
    # The end of what a client sends is counted as a byte.
    if more in (0, 1, len(piece), len(piece) + 1):
        return more >= len(piece)
    # Other systems do not say. What comes next is the piece, unless it was taken.
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    with contextlib.suppress(OSError):
        return connection.recv(len(piece), flags) != piece
    return True


def _count_taken(connection: socket.socket) -> int:
    """Bytes taken from ``connection`` since it was made; -1: not known."""
    if not hasattr(socket, "TCP_INFO"):
        return -1
    waiting = array.array("i", [0])
    try:
        for _ in range(100):  # until nothing comes in meanwhile
            before = _count_received(connection)
            fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
            if before == _count_received(connection):
                return before - waiting[0]
    except (OSError, struct.error):
        pass
    return -1


def _count_received(connection: socket.socket) -> int:
    size = RECEIVED_AT + 8
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    received: int = struct.unpack_from("=Q", info, RECEIVED_AT)[0]
    return received
