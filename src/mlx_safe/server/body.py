"""Reading the body of a request: bounded in size, in time, and in memory of all.

A body has a length (``Content-Length``) or comes in chunks (RFC 9112, section 7.1).
What cannot be read is refused at once, and the connection ends there: where the next
request would begin is not known.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from typing import Any

from .replies import BadRequest, BodyCut, NotEnoughMemory

__all__ = ["DEFAULT_MAX_BYTES", "Bodies", "Hold", "discard"]

DEFAULT_MAX_BYTES = 32 * 2**20
# A body may take GRACE_S, and a second more for each so many bytes that have come.
GRACE_S = 30.0
BYTES_PER_S_MIN = 64 * 2**10
# All bodies together, from when they are read until their answers are complete. Those
# of up to 1 MiB have room of their own, which slow large ones cannot take. A thread and
# its buffers, which every connection has, take more than the smallest.
SMALLEST = 64 * 2**10
SMALL = 2**20
SMALL_TOTAL = 32 * 2**20
LARGE_AT_ONCE = 2  # of the largest
# How long one waits for its room.
WAIT_S = 30.0

LINE_MAX = 1024  # bytes of a chunk's size with its extensions, or of a trailer
TRAILERS_MAX = 64
PIECE = 2**16

# A client that still sends must have sent it all before it reads the answer.
DISCARD_S = 30.0
DISCARD_IDLE_S = 2.0


class Hold:
    """Room that one body has. Of one handler."""

    def __init__(self) -> None:
        self._taken: list[tuple[_Room, int]] = []

    def take(self, room: _Room, size: int) -> None:
        """Waits for ``size`` bytes of ``room``.

        Raises:
            NotEnoughMemory: others have it for too long.
        """
        if not room.take(size, WAIT_S):
            raise NotEnoughMemory(
                "Too many large requests are being read at the moment."
            )
        self._taken.append((room, size))

    def give_back(self) -> None:
        """Frees all that was taken. Thread of its handler."""
        for room, size in self._taken:
            room.give_back(size)
        self._taken.clear()


class _Room:
    """Bytes that bodies may have together. Thread-safe."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    def take(self, size: int, wait_s: float) -> bool:
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= size, wait_s):
                return False
            self._free -= size
            return True

    def give_back(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class Bodies:
    """The bodies of all requests of a server.

    Args:
        max_bytes: of one body.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._small = _Room(SMALL_TOTAL)
        self._large = _Room(LARGE_AT_ONCE * max_bytes)
        self._parsing = threading.Lock()

    @contextmanager
    def holding(self) -> Iterator[Hold]:
        """Keeps the room of a body that is read in the block, until its end."""
        hold = Hold()
        try:
            yield hold
        finally:
            hold.give_back()

    @contextmanager
    def parsing(self, size: int) -> Iterator[None]:
        """One large body at a time is made into values, which take several times it."""
        if size <= SMALL:
            yield
        else:
            with self._parsing:
                yield

    def read(self, handler: Any, hold: Hold) -> bytearray:
        """The body of the request that ``handler`` has the headers of.

        ``handler`` is a `BaseHTTPRequestHandler`. Its connection stands behind the
        body afterwards, or is marked to be closed when something is raised.

        Raises:
            BadRequest: with the status that says what is wrong.
            NotEnoughMemory: there is no room for it.
            ConnectionError: the client is gone.
        """
        closes = handler.close_connection
        handler.close_connection = True
        length = _length(handler.headers, handler.request_version)
        if length is not None:
            self._check_size(length)
            if length > SMALLEST:
                hold.take(self._small if length <= SMALL else self._large, length)
        else:
            hold.take(self._small, min(SMALL, self.max_bytes))
        _check_expectation(handler)
        wire = _Wire(handler)
        try:
            if length is not None:
                found = bytearray(length)
                wire.fill(memoryview(found))
            else:
                found = self._read_chunks(wire, hold)
        finally:
            handler.connection.settimeout(handler.timeout)
        handler.close_connection = closes
        return found

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise BadRequest(
                f"The body is too large: at most {self.max_bytes} bytes are read "
                "(--max-request-bytes).",
                status=413,
                code="request_too_large",
            )

    def _read_chunks(self, wire: _Wire, hold: Hold) -> bytearray:
        found = bytearray()
        while True:
            size = _chunk_size(wire.line())
            if size == 0:
                break
            self._check_size(len(found) + size)
            if len(found) <= SMALL < len(found) + size:
                hold.take(self._large, self.max_bytes)
            begin = len(found)
            for at in range(begin, begin + size, PIECE):
                piece = bytearray(min(PIECE, begin + size - at))
                wire.fill(memoryview(piece))
                found += piece
            if wire.line():
                raise _malformed("a chunk is longer than it says")
        for _ in range(TRAILERS_MAX):
            if not wire.line():
                return found
        raise _malformed("it has too many trailers")


class _Wire:
    """What comes on a connection, as long as it comes fast enough."""

    def __init__(self, handler: Any) -> None:
        self._rfile = handler.rfile
        self._connection = handler.connection
        self._begun = time.monotonic()
        self._received = 0

    def _wait(self) -> None:
        allowed = GRACE_S + self._received / BYTES_PER_S_MIN
        left = self._begun + allowed - time.monotonic()
        if left <= 0:
            raise _too_slow()
        self._connection.settimeout(left)

    def fill(self, view: memoryview) -> None:
        while view:
            self._wait()
            try:
                count = self._rfile.readinto1(view)
            except TimeoutError:
                raise _too_slow() from None
            if not count:
                raise BodyCut("The body cannot be read: it ends too early.")
            self._received += count
            view = view[count:]

    def line(self) -> bytes:
        """The next line, without its end. A single line feed ends none."""
        found = bytearray()
        byte = bytearray(1)
        while not found.endswith(b"\r\n"):
            if len(found) >= LINE_MAX:
                raise _malformed("a line between its chunks is too long")
            self.fill(memoryview(byte))
            found += byte
        return bytes(found[:-2])


def _too_slow() -> BadRequest:
    return BadRequest("The body came too slowly.", status=408, code="request_timeout")


def _malformed(what: str) -> BadRequest:
    return BadRequest(f"The body cannot be read: {what}.")


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip(b" \t")
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
        raise _malformed("a chunk has no size")
    return int(digits, 16)


def _length(headers: Message, version: str) -> int | None:
    """The length that ``headers`` announce; None: the body comes in chunks."""
    lengths = headers.get_all("Content-Length", [])
    codings = ",".join(headers.get_all("Transfer-Encoding", []))
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise BadRequest(
            "A body with a Content-Encoding is not supported.",
            status=415,
            code="unsupported_media_type",
        )
    if codings:
        if lengths:
            raise BadRequest(
                "A body has a Content-Length or a Transfer-Encoding, not both."
            )
        if codings.strip().lower() != "chunked" or version == "HTTP/1.0":
            raise BadRequest("The only Transfer-Encoding that is supported is chunked.")
        return None
    if not lengths:
        raise BadRequest(
            "The Content-Length is missing.", status=411, code="length_required"
        )
    if len(lengths) > 1:
        raise BadRequest("There is more than one Content-Length.")
    digits = lengths[0].strip(" \t")
    if not re.fullmatch("[0-9]+", digits):
        raise BadRequest("The Content-Length is no number of bytes.")
    return int(digits) if len(digits) <= 18 else 10**18  # too large in any case


def _check_expectation(handler: Any) -> None:
    """The client may wait for a word before it sends the body."""
    expected = handler.headers.get("Expect", "").strip().lower()
    if not expected or handler.request_version == "HTTP/1.0":
        return
    if expected != "100-continue":
        raise BadRequest(
            "The only Expect that is supported is 100-continue.",
            status=417,
            code="expectation_failed",
        )
    handler.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def discard(connection: socket.socket) -> None:
    """Ends our side of a connection and reads on for a while, into nothing.

    A connection that is closed with something unread is reset (TCP), and the client
    may lose the answer that it has not read yet. Many send all before they read.
    """
    end = time.monotonic() + DISCARD_S
    into = bytearray(PIECE)
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(DISCARD_IDLE_S)
        while time.monotonic() < end and connection.recv_into(into):
            pass
