"""What a server has read of a request, in a file that outlives it.

The file has no name. It begins with `HEAD` and `SENT`; then come the bytes of the
request. The server writes it, and the supervisor has it as well. The server may be
killed in the midst of any call. What the file says and what is still in the connection
are then together what the client has sent, without a gap and with nothing twice.

For that a piece is looked at, written here, announced, and only then taken from the
connection. If the server dies between the last two it is asked for: `settle`.

Behind the request come the entries of a stream (`begun`), one for each piece, before
the piece is sent. How much of them was sent the system is asked for; where it does not
say, each is marked when it was.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import socket
import struct
import tempfile

from . import tcp
from .begun import Begun

__all__ = ["RequestFile", "State"]

# State; whether the server works on the request, and how many have died while they
# did. Then bytes: of the piece being taken, of the request before it, and those taken
# from the connection in all.
HEAD = struct.Struct("=B?BIQQ")
# Bytes of the stream that were sent. Apart, as another thread writes it.
SENT = struct.Struct("=Q")
START = HEAD.size + SENT.size  # of the request
PIECE = 1 << 16
# It is in memory on Linux. An answer of 70,000 tokens or so cannot be gone on with.
STREAM_MAX = 32 << 20


class State(enum.IntEnum):
    """How far the request of a connection is."""

    READING = 0  # or waited for, or all of it is there: nothing of its answer was sent
    BEGUN = 1  # something was, and only this server can go on
    STREAMS = 2  # something was, and the next server can go on


class RequestFile:
    """One such file; ``fd`` is its owner's. Not thread-safe.

    Attributes:
        state, deaths, size: as in `HEAD`, when it was opened or by its own writes.
        is_worked_on: the generation thread works on the request.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        head = HEAD.unpack(os.pread(fd, HEAD.size, 0))
        state, self.is_worked_on, self.deaths, *counts = head
        self._moving, self.size, self._total = counts
        self.state = State(state)
        self._end = os.fstat(fd).st_size

    @classmethod
    def make(cls) -> RequestFile:
        """Of a connection of which nothing was read; in memory where that can be."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("mlx-safe-request")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        try:
            os.write(fd, bytes(START))
            return cls(fd)
        except OSError:
            os.close(fd)
            raise

    def close(self) -> None:
        """Gives this process's descriptor back; the file lives on elsewhere."""
        os.close(self.fd)

    def read(self, count: int | None = None) -> bytes:
        """The first ``count`` bytes of the request; None: all of them."""
        count = self.size if count is None else min(count, self.size)
        return os.pread(self.fd, count, START)

    @property
    def kept(self) -> int:
        """Bytes of the file, when it was opened or settled."""
        return self._end

    def begun(self) -> tuple[Begun, bytes]:
        """The stream, and what of it is still to be sent. Raises ValueError."""
        (sent,) = SENT.unpack(os.pread(self.fd, SENT.size, HEAD.size))
        found = self._read_begun()
        return found, found.output[sent:]

    def _read_begun(self) -> Begun:
        at = START + self.size
        return Begun(os.pread(self.fd, os.fstat(self.fd).st_size - at, at))

    def _write_head(self) -> None:
        counts = self._moving, self.size, self._total
        head = HEAD.pack(self.state, self.is_worked_on, self.deaths, *counts)
        os.pwrite(self.fd, head, 0)

    # -- by a server ---------------------------------------------------------------

    def add(self, data: bytes | memoryview) -> None:
        """``data`` was taken already. Raises OSError when the disk is full."""
        self._append(data)
        self.size += len(data)
        self._write_head()

    def _append(self, data: bytes | memoryview) -> None:
        self._write(data, START + self.size)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        while data:
            count = os.pwrite(self.fd, data, at)
            at, data = at + count, data[count:]

    def receive(self, connection: socket.socket, buffer: memoryview) -> int:
        """Reads from ``connection`` into ``buffer``, as ``recv_into`` does."""
        if self.state is not State.READING:  # it is not needed any more
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
            os.ftruncate(self.fd, START)

    def works(self, does: bool) -> None:
        """Whether the generation thread works on the request."""
        self.is_worked_on = does
        self._write_head()

    def stream(self, entry: bytes) -> None:
        """The first piece of a stream is about to be sent. Raises OSError: as `add`."""
        self._end = START + self.size
        os.ftruncate(self.fd, self._end)
        self.mark_sent(0)
        self.add_entry(entry)
        self.reach(State.STREAMS)

    def add_entry(self, entry: bytes) -> None:
        """Another piece of it is. Raises OSError: as `add`, and beyond `STREAM_MAX`."""
        if self._end + len(entry) > STREAM_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._write(entry, self._end)
        self._end += len(entry)

    def mark_sent(self, count: int) -> None:
        """So many bytes of the stream were sent."""
        os.pwrite(self.fd, SENT.pack(count), HEAD.size)

    def next(self, ahead: bytes) -> None:
        """Another request begins, with ``ahead``, which was read already."""
        os.ftruncate(self.fd, START)
        self.state, self.is_worked_on = State.READING, False
        self.deaths, self.size = 0, 0
        try:
            self.add(ahead)
        except OSError:  # as in `receive`
            self.reach(State.BEGUN)

    # -- by the supervisor ---------------------------------------------------------

    def settle(self, connection: socket.socket) -> None:
        """The server is dead; from now on the file says what the next one can do."""
        if self.state is State.STREAMS and not self._settle_stream(connection):
            self.reach(State.BEGUN)
        if self.state is State.BEGUN:
            return
        if self._moving:
            piece = os.pread(self.fd, self._moving, START + self.size)
            if _was_taken(connection, self._total, piece):
                self._taken()
        self._moving = 0
        self.deaths += self.is_worked_on
        self.is_worked_on = False
        self._write_head()

    def _settle_stream(self, connection: socket.socket) -> bool:
        """Finds out how much of the stream was sent; False: nobody knows."""
        try:
            found, rest = self.begun()
        except ValueError:
            return False
        sent = len(found.output) - len(rest)
        count = tcp.count_sent(connection) if found.before >= 0 else -1
        if count >= 0:
            sent = count - found.before
            if not 0 <= sent <= len(found.output):
                return False
        elif rest:  # it may have been, or not, or in part
            return False
        self._end = START + self.size + found.size
        os.ftruncate(self.fd, self._end)  # without an entry that was cut short
        self.mark_sent(sent)
        return True


def _was_taken(connection: socket.socket, total: int, piece: bytes) -> bool:
    """Whether ``piece`` was taken from ``connection``, after ``total`` bytes."""
    more = tcp.count_taken(connection) - total
    # The end of what a client sends is counted as a byte.
    if more in (0, 1, len(piece), len(piece) + 1):
        return more >= len(piece)
    # Other systems do not say. What comes next is the piece, unless it was taken.
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    with contextlib.suppress(OSError):
        return connection.recv(len(piece), flags) != piece
    return True
