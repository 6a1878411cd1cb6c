"""What the supervisor keeps of the server's connections, for when the server dies.

The two share a socket pair. For each connection that the server accepts it hands the
parent the connection itself and a file without a name. There it keeps what it has read
of the request and how far it is with the answer. No message is sent for a token or a
request: when the server is dead, by whatever killed it, the files are there. The parent
gives what had no byte of its answer to the next server (`Held.taken`), and streams that
had begun (`Held.begun`), with what they had said. It closes the others, whose clients
see that they are cut.

A message is `RECORD`: what, and which connection; files come with it (SCM_RIGHTS):
the connection and its `request_file`.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

from . import begun, tcp
from .begun import Begun, Note
from .request_file import RequestFile, State

__all__ = [
    *("CHANNEL_FD", "Handover", "Held", "Message"),
    *("connection_of", "readable", "receive", "send"),
]

CHANNEL_FD = "MLX_SAFE_CHANNEL_FD"
RECORD = struct.Struct("=Bq")
# The parent does nothing but listen; one that is silent for so long is stopped.
SEND_TIMEOUT_S = 5.0


class Message(enum.IntEnum):
    """What is sent over the channel: by the server, except for `TAKE`."""

    LISTENS = 1  # from now on it accepts connections itself
    READY = 2  # the model is loaded
    WORKED = 3  # a request was completed
    HOLD = 4  # with the connection and its file
    DONE = 5  # the connection is closed
    TAKE = 6  # the parent's: serve this one, with the connection and its file


def send(
    channel: socket.socket, message: Message, key: int = 0, files: tuple[int, ...] = ()
) -> None:
    """Sends one record. Raises OSError when the other end is closed."""
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


def connection_of(fd: int) -> socket.socket:
    """The connection that ``fd`` is, whose client may have left by now."""
    try:
        return socket.socket(fileno=fd)
    except OSError:
        # Python asks of what kind it is, and of a connection that was reset, as by
        # health checks, macOS (xnu) returns EINVAL.
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        return socket.socket(*kind, fileno=fd)


class Held:
    """One connection of the server, as the parent keeps it.

    Used by its handler; `works` by the generation thread.

    Attributes:
        taken: what an earlier server had read of the request, and did not answer.
        begun: the stream that it had begun to answer with; None: it had not.
        rest: what of that is in the file, and still to be sent.
        is_asked: all of a request is there, and its handler waits for the answer.
    """

    def __init__(self, handover: Handover, key: int, file: RequestFile | None) -> None:
        self._handover = handover
        self._key = key
        self._file = file
        self._lock = threading.Lock()
        self._at_work: set[object] = set()  # of the request's choices
        self.taken = b"" if file is None else file.read()
        self.is_asked = False
        self.begun: Begun | None = None
        self.rest = b""
        # For the next entry of a stream; None: the answer is none that can go on.
        self._notes: list[Note] | None = None
        self._sent = -1  # bytes of it, where the system does not count them
        if file is not None and file.state is State.STREAMS:
            self.begun, self.rest = file.begun()
            self._notes = []
            if self.begun.before < 0:
                self._sent = len(self.begun.output)

    @property
    def deaths(self) -> int:
        """How many servers died while they worked on the request."""
        file = self._file
        return 0 if file is None else file.deaths

    def receive(self, connection: socket.socket, buffer: memoryview) -> int:
        """Reads from ``connection`` into ``buffer``, as ``recv_into`` does."""
        if self._file is None:
            return connection.recv_into(buffer)
        return self._file.receive(connection, buffer)

    def streams(
        self,
        connection: socket.socket,
        id: str,
        model: str | None,
        created: int,
        is_chunked: bool,
    ) -> None:
        """The answer is going to be a stream, with which the next server can go on.

        The arguments are those of `begun.opening`.
        """
        if self._file is None or self._notes is not None:
            return
        before = tcp.count_sent(connection)
        self._sent = 0 if before < 0 else -1
        self._notes = [begun.opening(id, model, created, is_chunked, before)]

    def streams_not(self) -> None:
        """It is another one, after all."""
        if self._file is not None and self._file.state is not State.STREAMS:
            self._notes = None

    @property
    def is_noting(self) -> bool:
        """Whether `note` does anything."""
        return self._notes is not None

    def note(self, note: Note) -> None:
        """Something that the next server has to know, once the next piece is sent."""
        if self._notes is not None:
            self._notes.append(note)

    def sends(self, piece: bytes) -> None:
        """``piece`` of the answer is about to be sent."""
        file = self._file
        if file is None or file.state is State.BEGUN:
            return
        if self._notes is not None:
            entry = begun.entry(self._notes, piece)
            self._notes = []
            with contextlib.suppress(OSError):  # a full disk
                if file.state is State.STREAMS:
                    file.add_entry(entry)
                else:
                    with self._lock:
                        file.stream(entry)
                return
            self._notes = None
        with self._lock:
            file.reach(State.BEGUN)

    def has_sent(self, piece: bytes) -> None:
        """It was sent."""
        if self._file is not None and self._notes is not None and self._sent >= 0:
            self._sent += len(piece)
            self._file.mark_sent(self._sent)

    def works(self, choice: object, does: bool) -> None:
        """Whether the generation thread works on one ``choice`` of the answer.

        If the process dies meanwhile, the request may be why.
        """
        with self._lock:
            self._at_work.add(choice) if does else self._at_work.discard(choice)
            file, is_worked_on = self._file, bool(self._at_work)
            if file is not None and file.is_worked_on is not is_worked_on:
                file.works(is_worked_on)

    def next(self, ahead: bytes) -> None:
        """Another request begins, with ``ahead``, which was read already."""
        with self._lock:
            self.is_asked = False
            self.begun, self._notes = None, None
            self._at_work.clear()
            if self._file is not None:
                self._file.next(ahead)

    @property
    def is_reading(self) -> bool:
        """Not all of its request is there, and there is a parent that keeps it."""
        return not self.is_asked and self.leave()

    def leave(self) -> bool:
        """The next server is to have it; False when there is no parent, or too late."""
        return (
            self._file is not None
            and self._file.state is not State.BEGUN
            and self._handover.is_there
        )

    def close(self) -> None:
        """The connection is closed."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()
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
        self._sent: set[Message] = set()
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
        """Sends ``message`` to the parent; no more once it does not listen."""
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
        if message not in self._sent:
            self._sent.add(message)
            self.tell(message)

    def hold(self, connection: socket.socket) -> Held:
        """The server has accepted ``connection``."""
        if self._channel is None:
            return Held(self, 0, None)
        try:
            key, file = next(self._keys), RequestFile.make()
        except OSError:  # no more files: it is served, and not held
            return Held(self, 0, None)
        self.tell(Message.HOLD, key, (connection.fileno(), file.fd))
        return Held(self, key, file)

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
                    held = Held(self, key, RequestFile(files[1]))
                    serve(connection_of(files[0]), held)
