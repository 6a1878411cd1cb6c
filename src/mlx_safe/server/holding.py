"""The connections that the supervisor holds while there is no server.

Used by the supervisor's one thread; those that are refused are answered on threads of
their own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import socket
import threading
import time
from dataclasses import dataclass

from . import handover
from .begun import Begun
from .handover import Message
from .logs import fields
from .request import SUSPECT_FROM
from .request_file import RequestFile, State

__all__ = ["GIVES_UP", "STOPPING", "Holding"]

log = logging.getLogger("mlx_safe.supervisor")

# Beyond them a connection is refused. The bytes are those of bodies that were read;
# of others the system keeps what was sent.
CONNECTIONS_MAX = 512
BYTES_MAX = 256 << 20
# So many servers died while they worked on a request, the last on it alone.
DEATHS_MAX = SUSPECT_FROM + 1
# Why a client gets a 503.
STARTING = "The server is starting."
STOPPING = "The server is stopping."
GIVES_UP = "The server has ended too often, and is not started again."
SUSPECT = "Three servers died while they worked on this request. It is not run again."
RETRY_AFTER_S = 5
RETRY_AFTER_MAX_S = 60
# For one client that is refused, from then to its end; beyond so many at a time, the
# others wait.
ANSWER_TIMEOUT_S = 10.0
ANSWERED_AT_ONCE_MAX = 64
# Asks whether there is a server, and needs the answer at once.
PROBES = tuple(
    method + path + end
    for method in (b"GET ", b"HEAD ")
    for path in (b"/health", b"/metrics")
    for end in (b" ", b"?")
)
PROBE_LENGTH = max(map(len, PROBES))


@dataclass
class _Kept:
    """One connection, with the file of its request.

    Attributes:
        since: monotonic seconds since when it waits for a server.
        looked: it is known not to be a probe.
    """

    connection: socket.socket
    file: RequestFile
    since: float = math.inf
    looked: bool = False

    @functools.cached_property
    def stream(self) -> tuple[Begun, bytes] | None:
        """As of `RequestFile.begun`, read once, when no server goes on with it."""
        return self.file.begun() if self.file.state is State.STREAMS else None

    @property
    def id(self) -> str | None:
        """What its client knows it by; None: nothing of its answer was sent."""
        return None if self.stream is None else self.stream[0].id

    def close(self) -> None:
        self.connection.close()
        self.file.close()

    def outlive(self) -> bool:
        """The server is dead; whether another one can answer, or go on with it."""
        try:
            self.file = RequestFile(self.file.fd)  # as the server has left it
            self.file.settle(self.connection)
        except Exception as e:
            # What ended the server may have overwritten its memory before, and with
            # that what it wrote here. The others' clients still have this process.
            log.warning(
                "a connection is cut: what the server left of it cannot be read: %s",
                type(e).__name__,
            )
            return False
        return self.file.state is not State.BEGUN


class Holding:
    """What the last server accepted (``kept``), and what waits for the next.

    Args:
        hold_s: for how long at most; 0: nothing is held, what comes in is refused.

    Attributes:
        last_start_s: what the last start took, until the model was loaded.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._kept: dict[int, _Kept] = {}
        self._waiting: dict[int, _Kept] = {}
        # The server's own are positive.
        self._keys = itertools.count(-1, -1)
        self.last_start_s: float | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def may_accept(self) -> bool:
        """There is a thread for one more that must be refused."""
        return threading.active_count() <= ANSWERED_AT_ONCE_MAX

    # -- while a server lives ------------------------------------------------------

    def keep(self, key: int, files: list[int]) -> None:
        """The server has accepted a connection."""
        if len(files) == 2:  # none when this process may not have more
            connection = handover.connection_of(files[0])
            self._kept[key] = _Kept(connection, RequestFile(files[1]))
        else:
            for fd in files:
                os.close(fd)

    def drop(self, key: int) -> None:
        """The server has closed a connection."""
        found = self._kept.pop(key, None)
        if found is not None:
            found.close()

    def give_to(self, channel: socket.socket) -> None:
        """A server listens: it takes what waits."""
        for key, kept in self._waiting.items():
            files = (kept.connection.fileno(), kept.file.fd)
            with contextlib.suppress(OSError):  # it is dead; its end will be heard of
                handover.send(channel, Message.TAKE, key, files)
            self._kept[key] = kept
        self._waiting.clear()

    def forget(self) -> None:
        """The server lives on without this process: its connections are its own."""
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    # -- while there is none -------------------------------------------------------

    def server_ended(self) -> bool:
        """What another can answer or go on with waits; the others are cut.

        Returns whether one was refused, as it may be what ends the servers.
        """
        refused = False
        for kept in self._kept.values():
            if not kept.outlive():
                kept.close()
            elif kept.file.deaths < DEATHS_MAX:
                self._wait(kept)
            else:
                log.warning(
                    "a request is refused: the server has died %d times while it "
                    "worked on it",
                    kept.file.deaths,
                    extra=fields(id=kept.id),
                )
                self._refuse(kept, SUSPECT)
                refused = True
        self._kept.clear()
        return refused

    def accept(self, connection: socket.socket) -> None:
        """A client has come."""
        self._wait(_Kept(connection, RequestFile.make()))

    def _wait(self, kept: _Kept) -> None:
        waiting = [kept, *self._waiting.values()]
        size = sum(one.file.kept for one in waiting)
        if not self._hold_s or len(self) >= CONNECTIONS_MAX or size > BYTES_MAX:
            self._refuse(kept)
            return
        kept.since, kept.looked = time.monotonic(), False
        self._waiting[next(self._keys)] = kept

    def look_round(self) -> None:
        """Answers probes, and whose time is over."""
        now = time.monotonic()
        for key, kept in list(self._waiting.items()):
            late, is_probe = now - kept.since >= self._hold_s, _is_probe(kept)
            if self.may_accept and (late or is_probe):
                del self._waiting[key]
                self._refuse(kept, is_told=not is_probe)

    def refuse_all(self, why: str) -> None:
        """There will be no other server; ``why`` is what its answer says."""
        threads = [self._refuse(kept, why) for kept in self._waiting.values()]
        self._waiting.clear()
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _refuse(
        self, kept: _Kept, why: str = STARTING, *, is_told: bool = True
    ) -> threading.Thread:
        has_asked = kept.file.size > 0
        if is_told and (has_asked or kept.looked):  # others have asked for nothing
            log.info("a request is answered here: %s", why, extra=fields(id=kept.id))
        if kept.stream is None:
            answer = _refusal(self.last_start_s, why)
        else:
            answer = _end_of_stream(*kept.stream, self.last_start_s, why)
        kept.file.close()
        thread = threading.Thread(
            target=_answer,
            args=(kept.connection, answer, has_asked),
            name="mlx-safe-refusal",
            daemon=True,
        )
        thread.start()
        return thread


def _is_probe(kept: _Kept) -> bool:
    """Looks at what was sent and leaves it there."""
    if kept.looked:
        return False
    if kept.file.size:
        seen = kept.file.read(PROBE_LENGTH)
    else:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
        try:
            seen = kept.connection.recv(PROBE_LENGTH, flags)
        except BlockingIOError:
            return False
        except OSError:
            seen = b""
    kept.looked = len(seen) >= PROBE_LENGTH
    return seen.startswith(PROBES)


def _error(last_start_s: float | None, why: str) -> dict[str, object]:
    seconds = RETRY_AFTER_S if last_start_s is None else math.ceil(last_start_s)
    return {
        "message": why,
        "type": "service_unavailable_error",
        "param": None,
        "code": "unavailable",
        "retry_after": min(max(seconds, 1), RETRY_AFTER_MAX_S),
    }


def _end_of_stream(
    stream: Begun, rest: bytes, last_start_s: float | None, why: str
) -> bytes:
    """What a stream ends with that no server goes on with; ``rest`` goes first."""
    if not stream.is_done:
        event: dict[str, object] = {"id": stream.id, "object": "error"}
        event |= {"model": stream.model, "created": stream.created}
        event["error"] = _error(last_start_s, why)
        data = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        rest += b"%x\r\n%b\r\n" % (len(data), data) if stream.is_chunked else data
    if stream.is_chunked and not stream.is_ended:
        rest += b"0\r\n\r\n"
    return rest


def _refusal(last_start_s: float | None, why: str = STARTING) -> bytes:
    error = _error(last_start_s, why)
    body = json.dumps({"error": error}).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Retry-After: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
        % (str(error["retry_after"]).encode(), len(body), body)
    )


def _answer(connection: socket.socket, answer: bytes, has_asked: bool) -> None:
    """Sends ``answer`` once the client has begun to ask."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    with connection, contextlib.suppress(OSError):
        if has_asked:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            # What was sent is read to its end: closing over unread data resets
            # the connection, and the client would not see the answer.
            if not connection.recv(1 << 16):
                return
            if not has_asked:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                has_asked = True
