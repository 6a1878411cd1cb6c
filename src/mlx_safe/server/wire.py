"""HTTP/1.1 as it goes over the wire: framing, and connections that are kept.

mlx-lm's handler writes as if its answer ended with the connection. `Wire` frames what
it writes, so that a client can distinguish a whole answer from one that was cut. It
knows nothing of mlx-lm.

Formats: RFC 9112, chunked transfer coding (section 7.1), persistence (9.3).
"""

from __future__ import annotations

import contextlib
import email.errors
import enum
import io
import select
import socket
import threading
import time
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler
from typing import Any

from .begun import END
from .body import discard
from .exchange import DISCONNECTED, Exchange
from .handover import Held

__all__ = ["KEEP_ALIVE_S", "Resting", "Wire"]

# How long a connection waits for its next request. Less than that of the clients'
# pools would make them send on a connection that is being closed; nginx's is 75 s.
KEEP_ALIVE_S = 75.0
# Each connection has a thread of its own; of those that wait, the oldest goes.
RESTING_MAX = 256


# Of a line among the headers without a name and a colon behind it.
NO_FIELD = (
    email.errors.MissingHeaderBodySeparatorDefect,
    email.errors.FirstHeaderLineIsContinuationDefect,
)


class Framing(enum.Enum):
    """How a client finds the end of an answer."""

    WHOLE = "by its length, which came with it"
    COLLECTED = "by its length, which is known when all of it is there"
    CHUNKED = "by a last chunk of length 0"
    CLOSED = "by the end of the connection, to a client of HTTP/1.0"
    NO_BODY = "it has no body"


class Resting:
    """The connections that wait for their next request. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: OrderedDict[socket.socket, None] = OrderedDict()

    def add(self, connection: socket.socket) -> None:
        """``connection`` rests; the one that has rested longest may have to go."""
        with self._lock:
            self._sockets[connection] = None
            if len(self._sockets) > RESTING_MAX:
                oldest, _ = self._sockets.popitem(last=False)
                with contextlib.suppress(OSError):  # its client was quicker
                    oldest.shutdown(socket.SHUT_RD)  # its thread wakes up

    def __contains__(self, connection: socket.socket) -> bool:
        return connection in self._sockets

    def remove(self, connection: socket.socket) -> None:
        """``connection`` has a request again, or ends."""
        with self._lock:
            self._sockets.pop(connection, None)


class _Reader(io.RawIOBase):
    """What a connection sends, with what an earlier server had read of it first.

    Attributes:
        count: bytes so far.
        is_paused: the connection is not asked, as if nothing had come.
    """

    def __init__(self, connection: socket.socket, held: Held) -> None:
        self._connection = connection
        self._held = held
        self._taken = memoryview(held.taken)
        self.count = 0
        self.is_paused = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._taken:
            count = min(len(buffer), len(self._taken))
            buffer[:count] = self._taken[:count]
            self._taken = self._taken[count:]
        elif self.is_paused:
            return None
        else:
            count = self._held.receive(self._connection, memoryview(buffer))
        self.count += count
        return count


class _Writer(io.BufferedIOBase):
    """``wfile``: frames what is written to it. One send for one write.

    Of a stream that an earlier server had begun it sends the rest.

    Attributes:
        sent: bytes of this answer that have gone out.
        sent_at: monotonic seconds of the last of them.
        broken: the client is gone, or the answer is to end here, unfinished.
    """

    def __init__(self, handler: Wire) -> None:
        self._handler = handler
        self.next()

    def next(self) -> None:
        """Another answer begins, or one goes on."""
        begun = self._handler.held.begun
        self.framing: Framing | None = None
        self.sent = 0
        if begun is not None:
            self.framing = Framing.CHUNKED if begun.is_chunked else Framing.CLOSED
            self.sent = len(begun.output)
        self.sent_at = time.monotonic()
        self.broken = False
        self._body = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        count = len(data)
        shaped = self._handler.shape(bytes(data))
        framing = self.framing
        if not shaped or framing is Framing.NO_BODY:
            return count
        if framing is Framing.CHUNKED:
            self.send(b"%x\r\n%b\r\n" % (len(shaped), shaped))
        elif framing is Framing.COLLECTED:
            self._body += shaped
        else:
            self.send(shaped)
        return count

    def end(self) -> None:
        """The answer is complete: sends what marks its end."""
        begun = self._handler.held.begun
        if self.broken or self.framing is None or (begun and begun.is_ended):
            return
        if self.framing is Framing.COLLECTED:
            self._handler.send_header("Content-Length", str(len(self._body)))
            self.send(b"" if self._handler.command == "HEAD" else self._body)
        elif self.framing is Framing.CHUNKED:
            self._handler.held.note(END)
            self.send(b"0\r\n\r\n")
        else:
            self.send(b"")

    def send(self, data: bytes) -> None:
        """Sends ``data``, after the headers if they are still here."""
        if not self.sent:
            data = self._handler.take_head() + data
        if not data:
            return
        held = self._handler.held
        held.sends(data)
        self._send_all(data)
        held.has_sent(data)
        self.sent += len(data)

    def send_rest(self) -> None:
        """What an earlier server was about to send goes first."""
        rest = self._handler.held.rest
        if rest:
            self._send_all(rest)

    def _send_all(self, data: bytes) -> None:
        try:
            self._handler.connection.sendall(data)
        except BaseException:
            self.broken = True
            raise
        self.sent_at = time.monotonic()


class Wire(BaseHTTPRequestHandler):
    """One connection, with one request after another. Runs on a thread of its own.

    An answer's headers wait for the first byte of its body, so that until then it
    can be another. A caller that has read the body of a request to its end calls
    `body_was_read`; where something is left of it the connection ends.
    """

    protocol_version = "HTTP/1.1"
    server: Any
    exchange: Exchange | None

    def setup(self) -> None:
        """Makes ``rfile``, ``wfile`` and the supervisor's share of the connection."""
        super().setup()
        # Not `disable_nagle_algorithm`: of a connection that was reset meanwhile, as
        # health checks are, macOS (xnu) takes no options (EINVAL).
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.held: Held = self.server.held(self.connection)
        self._reader = _Reader(self.connection, self.held)
        self._buffered = io.BufferedReader(self._reader)
        self.rfile: Any = self._buffered
        self.wfile: Any = _Writer(self)

    # -- connections --------------------------------------------------------------

    def handle(self) -> None:
        """Serves one request after another until the connection is to end."""
        try:
            self.wfile.send_rest()
        except DISCONNECTED:
            return
        # mlx-lm's handler keeps a request's state in its attributes: of one request
        # nothing may be left for the next.
        fresh = dict(vars(self))
        while True:
            vars(self).clear()
            vars(self).update(fresh)
            self.wfile.next()
            self._head_ends_at: int | None = None
            self._status: int | None = None
            self.close_connection = True
            self.exchange = None
            self.begin()
            try:
                self.handle_one_request()
            except BaseException as e:
                if self.exchange is not None:
                    self.exchange.error = self.exchange.error or e
                raise
            finally:
                if self.exchange is not None:
                    status = self._status if self.wfile.sent else None
                    self.exchange.close(status, not self.wfile.broken)
                    # What checks of HAProxy leave is no request.
                    if self.exchange.method != "-" or status is not None:
                        self.ended(self.exchange)
            if self.close_connection:
                return
            self.held.next(self._ahead())
            if not self._rest():
                return

    def begin(self) -> None:
        """Called before each request is read."""

    def ended(self, exchange: Exchange) -> None:
        """Called when the answer to a request has ended, however it did."""

    def handle_one_request(self) -> None:
        """Reads a request, has it answered, and ends the answer."""
        super().handle_one_request()
        unread = self._has_unread()
        self.close_connection = self.close_connection or unread
        self.wfile.end()
        if self.wfile.broken or self.wfile.framing in (None, Framing.CLOSED):
            self.close_connection = True
        elif unread:
            # Or the connection is reset, and the client does not see the answer.
            discard(self.connection)

    def _rest(self) -> bool:
        """Waits for the next request; False when there will be none."""
        if self._ahead():
            return True
        self.server.rest(self.connection)
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        try:
            return bool(poller.poll(KEEP_ALIVE_S * 1000))
        finally:
            self.server.resume(self.connection)

    def _ahead(self) -> bytes:
        """What has been received and not been read by the handler."""
        # Only of the buffer: a system call gives the GIL away, and to have it back
        # while a batch is put out takes up to 5 ms (`sys.getswitchinterval`).
        self._reader.is_paused = True
        try:
            ahead: bytes = self._buffered.peek(1)
        finally:
            self._reader.is_paused = False
        return ahead

    def body_was_read(self) -> None:
        """The body was read to its end, which the next request comes after."""
        self._head_ends_at = None

    def _position(self) -> int:
        return self._reader.count - len(self._ahead())

    def parse_request(self) -> bool:
        """Reads the head; False when it was refused."""
        self._head_ends_at = None
        self.exchange = Exchange()
        if not super().parse_request():
            return False
        if any(isinstance(d, NO_FIELD) for d in self.headers.defects):
            # What is behind such a line was not read as fields, the length of the
            # body for one, and the next request would begin in its midst.
            self.close_connection = True
            self.send_error(400, "A header cannot be read.")
            return False
        options = ",".join(self.headers.get_all("Connection", [])).lower().split(",")
        if self.request_version != "HTTP/1.1":
            # Such a client, and what stands between, may know nothing of chunks, and
            # of connections that are kept only what the headers of its time said.
            self.protocol_version = "HTTP/1.0"
            self.close_connection = True
        elif "close" in (option.strip() for option in options):
            self.close_connection = True
        self._head_ends_at = self._position()
        self.exchange.method, self.exchange.path = self.command, self.path
        return True

    def _has_unread(self) -> bool:
        """Whether something of the request's body is still to come."""
        if self._head_ends_at is None:
            return False
        count = self._position() - self._head_ends_at
        if self.headers.get("Transfer-Encoding"):
            return True
        lengths = self.headers.get_all("Content-Length", ["0"])
        return any(length.strip() != str(count) for length in lengths)

    # -- answers ------------------------------------------------------------------

    def shape(self, data: bytes) -> bytes:
        """What of ``data``, written as the body of an answer, is to be sent."""
        return data

    def end_headers(self) -> None:
        """Chooses the framing; the head waits for the first byte of the body."""
        head: list[bytes] = getattr(self, "_headers_buffer", [])  # none to HTTP/0.9
        status = int(head[0].split()[1]) if head else 0
        if 100 <= status < 200:
            self._headers_buffer: list[bytes] = []
            self.connection.sendall(b"".join(head) + b"\r\n")
            return
        fields = dict(line.lower().split(b":", 1) for line in head[1:])
        if status in (204, 304):
            framing = Framing.NO_BODY
        elif b"content-length" in fields:
            framing = Framing.NO_BODY if self.command == "HEAD" else Framing.WHOLE
        elif not fields.get(b"content-type", b"").strip().startswith(b"text/event"):
            framing = Framing.COLLECTED
        elif self.request_version == "HTTP/1.1":
            framing = Framing.CHUNKED
        else:
            framing = Framing.CLOSED
        self.wfile.framing = framing
        if self.wfile.sent:  # by an earlier server
            self._headers_buffer = []

    def take_head(self) -> bytes:
        """The headers, once, when the first byte of the answer goes out."""
        head: list[bytes] = getattr(self, "_headers_buffer", [])
        if not head:
            return b""
        framing = self.wfile.framing
        self.close_connection = self.close_connection or self._has_unread()
        if framing is Framing.CHUNKED:
            self.send_header("Transfer-Encoding", "chunked")
        if not self.close_connection:
            self.send_header("Keep-Alive", f"timeout={KEEP_ALIVE_S:.0f}")
        elif framing not in (None, Framing.CHUNKED, Framing.CLOSED):
            # Not of a stream: with it, fetch of Node 20 takes a stream that is cut
            # for one that has ended.
            self.send_header("Connection", "close")
        self._headers_buffer = []
        return b"".join(head) + b"\r\n"

    def drop_head(self) -> None:
        """Another answer takes the place of the one that has not gone out yet."""
        self._headers_buffer = []
        self.held.streams_not()
        self.wfile.next()

    def abandon(self) -> None:
        """The answer ends as it is; its client can tell that it is cut."""
        self._headers_buffer = []
        self.wfile.broken = True

    def leave_to_the_next(self) -> bool:
        """The next server is to answer, or to go on with a stream.

        False when there is none, or it could not.
        """
        if not self.held.leave():
            return False
        self.abandon()
        self.server.leave_open(self.connection)
        return True

    # What http.server would log; an `Exchange` tells of all of it.

    def log_request(self, code: int | str = "-", size: object = "-") -> None:
        """Notes the status: the last is what is sent, as mlx-lm begins with a 200."""
        if self.exchange is None:  # its line was too long to be read
            self.exchange = Exchange()
        self._status = int(code)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what is in it was sent by the client."""
