"""What the supervisor keeps of the server's connections, for when the server dies.

The two share a socket pair. For each connection that the server accepts it hands the
parent the connection itself and a file without a name, in which it keeps what it has
read of the request and how far it is with the answer. Nothing is told for a token, nor
for a request: when the server is dead, by whatever killed it, the files are there.
The parent gives what had no byte of its answer to the next server (`Held.taken`), and
closes the others, whose clients see that they are cut.

A message is `RECORD`: what, and which connection; files come with it (SCM_RIGHTS). A
file begins with two bytes, `State` and how many servers died while they ran the
request; then come the bytes of the request.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import select
import socket
import struct
import tempfile
import threading
from collections.abc import Callable

__all__ = [
    *("CHANNEL_FD", "Handover", "Held", "Message", "State"),
    *("HEAD_SIZE", "make_file", "readable", "receive", "send"),
]

CHANNEL_FD = "MLX_SAFE_CHANNEL_FD"
RECORD = struct.Struct("=Bq")
HEAD_SIZE = 2
# The parent does nothing but listen; one that is silent for so long is stopped.
SEND_TIMEOUT_S = 5.0


class Message(enum.IntEnum):
    """What is told over the channel. By the server, except for `TAKE`."""

    LISTENS = 1  # from now on it accepts connections itself
    READY = 2  # the model is loaded
    WORKED = 3  # a request was completed
    HOLD = 4  # with the connection and its file
    DONE = 5  # the connection is closed
    TAKE = 6  # the parent's: serve this one, with the connection and its file


class State(enum.IntEnum):
    """How far the request of a connection is."""

    READING = 0  # or waited for
    RUNNING = 1  # all of it is there, nothing of its answer has been sent
    BEGUN = 2


def send(
    channel: socket.socket, message: Message, key: int = 0, files: tuple[int, ...] = ()
) -> None:
    """Sends one record. Raises OSError when nobody is there."""
    record = RECORD.pack(message, key)
    sent = socket.send_fds(channel, [record], list(files))
    while sent < len(record):
        sent += channel.send(record[sent:])


def receive(channel: socket.socket) -> tuple[Message, int, list[int]] | None:
    """The next record, with its files; None at the channel's end."""
    record, files = b"", []
    while len(record) < RECORD.size:
        try:
            data, more, _, _ = socket.recv_fds(channel, RECORD.size - len(record), 2)
        except ConnectionError:
            data, more = b"", []
        record += data
        files += more
        if not data:
            return None
    number, key = RECORD.unpack(record)
    return Message(number), key, files


def readable(sockets: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Those that have something to read, after at most ``seconds``."""
    # Not select: numbers of files may be beyond what it takes.
    poller = select.poll()
    by_number = {s.fileno(): s for s in sockets}
    for number in by_number:
        poller.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poller.poll(seconds * 1000)]


def make_file() -> int:
    """A file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("mlx-safe-request")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.write(fd, bytes(HEAD_SIZE))
    return fd


class Held:
    """One connection of the server, as the parent keeps it. Used by its handler.

    Attributes:
        taken: what an earlier server had read of the request, and did not answer.
    """

    def __init__(self, handover: Handover, key: int, fd: int | None) -> None:
        self._handover = handover
        self._key = key
        self._fd = fd
        self._state = State.READING
        self.taken = b""
        if fd is not None:
            self._size = os.fstat(fd).st_size
            self.taken = os.pread(fd, self._size, 0)[HEAD_SIZE:]

    def add(self, data: bytes | memoryview) -> None:
        """``data`` of the request was read."""
        if self._fd is None or self._state is State.BEGUN:
            return
        try:
            self._size += os.pwrite(self._fd, data, self._size)
        except OSError:  # a full disk: without all of it nobody can run it again
            self.reach(State.BEGUN)

    def reach(self, state: State) -> None:
        """The request is so far."""
        if self._fd is None or state is self._state:
            return
        self._state = state
        os.pwrite(self._fd, bytes([state]), 0)
        if state is State.BEGUN:  # nobody will need what was read of it
            self._truncate()

    def next(self, ahead: bytes) -> None:
        """Another request begins, with ``ahead``, which was read already."""
        if self._fd is None:
            return
        self._truncate()
        self._state = State.READING
        self.add(ahead)
        os.pwrite(self._fd, bytes(HEAD_SIZE), 0)

    def _truncate(self) -> None:
        assert self._fd is not None
        os.ftruncate(self._fd, HEAD_SIZE)
        self._size = HEAD_SIZE

    def leave(self) -> bool:
        """The next server is to have it; False when there is no parent, or too late."""
        return (
            self._fd is not None
            and self._state is not State.BEGUN
            and self._handover.is_there
        )

    def close(self) -> None:
        """The connection is closed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._handover.tell(Message.DONE, self._key)


class Handover:
    """The server's end of the channel. Thread-safe; without a parent it does nothing.

    Args:
        fd: of the channel, which it takes over; None: there is no parent.
    """

    def __init__(self, fd: int | None) -> None:
        self._lock = threading.Lock()
        self._keys = itertools.count(1)
        self._channel = None if fd is None else socket.socket(fileno=fd)
        self._told: set[Message] = set()
        if self._channel is not None:
            self._channel.settimeout(None)
            # Of what is sent only: the parent may have nothing to say for days.
            wait = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
            self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)

    @classmethod
    def of_environment(cls) -> Handover:
        """With the channel that the parent has left in the environment, if any."""
        fd = os.environ.pop(CHANNEL_FD, None)
        return cls(None if fd is None else int(fd))

    @property
    def is_there(self) -> bool:
        """There is a parent."""
        return self._channel is not None

    def tell(self, message: Message, key: int = 0, files: tuple[int, ...] = ()) -> None:
        """Tells the parent; one that does not listen is not told again."""
        with self._lock:
            if self._channel is None:
                return
            try:
                send(self._channel, message, key, files)
            except OSError:
                # Killed, or stopped: the server goes on without it.
                with contextlib.suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)
                self._channel = None

    def tell_once(self, message: Message) -> None:
        """As `tell`, the first time."""
        if message not in self._told:
            self._told.add(message)
            self.tell(message)

    def hold(self, connection: socket.socket) -> Held:
        """The server has accepted ``connection``."""
        if self._channel is None:
            return Held(self, 0, None)
        try:
            key, fd = next(self._keys), make_file()
        except OSError:  # no more files: it is served, and not held
            return Held(self, 0, None)
        self.tell(Message.HOLD, key, (connection.fileno(), fd))
        return Held(self, key, fd)

    def take_over(self, serve: Callable[[socket.socket, Held], None]) -> None:
        """Calls ``serve``, on a thread, with what the parent has for this server."""
        if self._channel is not None:
            threading.Thread(
                target=self._take_over,
                args=(self._channel, serve),
                name="mlx-safe-handover",
                daemon=True,
            ).start()

    def _take_over(
        self, channel: socket.socket, serve: Callable[[socket.socket, Held], None]
    ) -> None:
        with contextlib.suppress(OSError):  # the channel is closed
            while (got := receive(channel)) is not None:
                message, key, files = got
                if message is Message.TAKE and len(files) == 2:
                    connection = socket.socket(fileno=files[0])
                    serve(connection, Held(self, key, files[1]))
