"""HTTP/1.1 on the wire: how the end of an answer is told, and what comes after it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.server import handover, wire
from mlx_safe.server.request_file import RequestFile
from support.programs import program
from support.server import BATCH_RUNS_S, CONTROLLED, Server

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
CHAT = "/v1/chat/completions"

# Connections that wait for a request are closed early, and few are kept.
HASTY = (
    """
from mlx_safe.server import wire
wire.KEEP_ALIVE_S = 1.0
wire.RESTING_MAX = 2
"""
    + CONTROLLED
)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    more = ("--prefill-step-size", "64")
    with Server(tiny_model, *more, program=CONTROLLED).wait_ready() as server:
        yield server


def ask(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def raw(body: Any, *headers: str, version: str = "1.1", path: str = CHAT) -> bytes:
    """A request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


@contextlib.contextmanager
def talk(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 60) as s:
        yield s


def read_all(s: socket.socket) -> bytes:
    """What comes until the server closes."""
    pieces = []
    while piece := s.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def read_until(s: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        piece = s.recv(1)
        assert piece, got
        got += piece
    return got


def head_of(answer: bytes) -> dict[str, str]:
    lines = answer.split(b"\r\n\r\n")[0].decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    return {"": lines[0], **fields}


def unchunked(answer: bytes) -> tuple[list[bytes], bool]:
    """The chunks of an answer's body, and whether the last one is there."""
    rest = answer.split(b"\r\n\r\n", 1)[1]
    chunks: list[bytes] = []
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        count = int(size, 16)
        if count == 0:
            assert rest == b"\r\n"
            return chunks, True
        chunks.append(rest[:count])
        rest = rest[count + 2 :]
    return chunks, False


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_chunked(server: Server, path: str) -> None:
    with talk(server) as s:
        s.sendall(raw(ask(stream=True, **PATHS[path])))
        answer = read_until(s, b"0\r\n\r\n")
        head = head_of(answer)
        assert head[""] == "HTTP/1.1 200 OK"
        assert head["transfer-encoding"] == "chunked"
        assert "content-length" not in head
        # With it, fetch of Node 20 takes a stream that is cut for a whole one.
        assert "connection" not in head
        chunks, ended = unchunked(answer)
        assert ended
        # An event is a chunk: what has come can be read.
        assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") for c in chunks)
        assert chunks[-1] == b"data: [DONE]\n\n"
        # The connection is good for another.
        s.sendall(raw(ask("again", stream=True, **PATHS[path]), "Connection: close"))
        answer = read_all(s)
        assert unchunked(answer)[1]
        assert "connection" not in head_of(answer)


def test_clients_of_http_1_0_get_what_they_did(server: Server) -> None:
    with talk(server) as s:
        s.sendall(raw(ask(stream=True), "Connection: keep-alive", version="1.0"))
        answer = read_all(s)
    head = head_of(answer)
    assert head[""] == "HTTP/1.0 200 OK"
    assert "transfer-encoding" not in head
    body = answer.split(b"\r\n\r\n", 1)[1]
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", PATHS)
def test_requests_on_one_connection(server: Server, path: str) -> None:
    connection = server.connect()
    ids, local = set(), connection.sock.getsockname()
    with contextlib.closing(connection):
        for stream in (False, True, False):
            body = json.dumps(ask(stream=stream, **PATHS[path]))
            connection.request("POST", CHAT, body)
            answer = connection.getresponse().read().decode()
            event = answer.removeprefix("data: ").split("\n")[0]
            ids.add(json.loads(event)["id"])
            assert connection.sock.getsockname() == local
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/nothing", None, 404),
        ("OPTIONS", CHAT, None, 204),
        ("POST", CHAT, ask(), 200),
        ("POST", CHAT, ask(temperature="hot"), 400),
        ("POST", CHAT, ask("", max_tokens=-1), 400),
        ("POST", "/v1/completions", {"prompt": ""}, 400),
        ("POST", "/nothing", {}, 404),
    ],
)
def test_an_answer_without_a_stream_tells_its_length(
    server: Server, method: str, path: str, body: Any, status: int
) -> None:
    with contextlib.closing(server.connect()) as connection:
        for _ in range(2):
            raw_body = None if body is None else json.dumps(body)
            connection.request(method, path, raw_body)
            response = connection.getresponse()
            assert response.status == status
            length = response.headers["Content-Length"]
            assert (length is None) == (status == 204)
            assert len(response.read()) == int(length or 0)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with talk(server) as s:
        get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        s.sendall(
            raw(ask("one", stream=True))
            + get
            + raw(ask("two"))
            + raw(ask("three", stream=True), "Connection: close")
        )
        answer = read_all(s)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b"[DONE]") == 2
    first, health, second, third = answer.split(b"HTTP/1.1 ")[1:]
    assert b"chunk" in first and b"chunk" in third
    assert b'{"status": "ok",' in health
    assert b'"object": "chat.completion"' in second


def test_a_body_that_is_not_read_ends_the_connection(server: Server) -> None:
    """What is left of it would be taken for the next request."""
    with talk(server) as s:
        s.sendall(raw(b"x" * 10_000_000, path="/nothing")[: 1 << 20])
        answer = read_all(s)
    head = head_of(answer)
    assert " 404 " in head[""]
    assert head["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 0\r\nContent-Length: 5",
        "Connection: x\r\nConnection: close\r\nContent-Length: 5",
    ],
)
def test_a_body_of_unclear_length_ends_the_connection(
    server: Server, headers: str
) -> None:
    """Proxies may read the length otherwise, and pass the body on as such."""
    with talk(server) as s:
        request = f"GET /v1/models HTTP/1.1\r\n{headers}\r\n\r\nhello"
        s.sendall(request.encode() + b"GET /v1/models HTTP/1.1\r\n\r\n")
        answer = read_all(s)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert head_of(answer)["connection"] == "close"


def test_a_header_that_is_none_is_refused(server: Server) -> None:
    with talk(server) as s:
        s.sendall(b"GET /v1/models HTTP/1.1\r\na line of its own\r\n\r\n")
        answer = read_all(s)
    head = head_of(answer)
    assert (" 400 " in head[""], head["connection"]) == (True, "close")


# macOS takes no options for a connection that was reset.
TAKES_NO_OPTIONS = program("sockets_without_options")


def test_a_connection_that_takes_no_options_is_no_failure(tiny_model: Path) -> None:
    with Server(tiny_model, program=TAKES_NO_OPTIONS).wait_ready() as server:
        assert server.chat().status == 200
        assert "a handler failed" not in server.log


def test_what_an_earlier_server_had_read_comes_first() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        earlier = RequestFile.make()
        earlier.add(b"x" * 3_000_000)
        earlier.add(b"y")
        held = handover.Held(handover.Handover(None), 1, RequestFile(earlier.fd))
        reader = io.BufferedReader(wire._Reader(ours, held))
        theirs.sendall(b"z")
        theirs.close()
        assert reader.read() == b"x" * 3_000_000 + b"yz"
        # Should this one die, too, the next has all of it.
        assert RequestFile(earlier.fd).read()[-2:] == b"yz"
        earlier.close()


def test_expecting_continue(server: Server) -> None:
    request = raw(ask(), "Expect: 100-continue")
    head, body = request.split(b"\r\n\r\n", 1)
    with talk(server) as s:
        s.sendall(head + b"\r\n\r\n")
        assert read_until(s, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(body)
        assert b" 200 " in read_until(s, b"\r\n\r\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_leaving_a_connection_that_was_kept(
    server: Server, path: str, when: str
) -> None:
    """With a second request already behind the first."""
    size, step = (300 * 64, 5) if when == "prefill" else (5, 20)
    body = ask("x" * size, max_tokens=20_000, stream=True, **PATHS[path])
    seen = server.disconnects
    with talk(server) as s:
        s.sendall(raw(ask()))
        read_until(s, b"\r\n\r\n")
        server.hold(step)
        s.sendall(raw(body))
        server.wait_held()
        s.sendall(raw(ask()))
    server.wait_for_log("outcome=client_left", seen + 1)
    assert server.metric("mlx_safe_requests_in_flight") == 0
    server.go()
    assert server.chat(**PATHS[path]).status == 200
    assert server.disconnects == seen + 1


def test_a_health_check_that_is_reset_is_no_client_that_left(server: Server) -> None:
    before = server.log.count("outcome=client_left")
    for version in ("1.0", "1.1"):
        for answered in (False, True):
            with talk(server) as s:
                request = f"GET /health HTTP/{version}\r\nHost: x\r\n\r\n"
                s.sendall(request.encode())
                if answered:
                    s.recv(12)
                linger = struct.pack("ii", 1, 0)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert server.chat().status == 200
    assert server.log.count("outcome=client_left") == before
    assert "a handler failed" not in server.log


def test_connections_that_wait_are_closed_in_time(tiny_model: Path) -> None:
    with Server(tiny_model, program=HASTY).wait_ready() as server:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(talk(server)) for _ in range(4)]
            for s in connections:
                s.sendall(raw(ask()))
                head = head_of(read_until(s, b"\r\n\r\n"))
                assert head["keep-alive"] == "timeout=1"
                s.recv(int(head["content-length"]), socket.MSG_WAITALL)
            for s in connections:
                assert s.recv(1) == b""
        assert "outcome=client_left" not in server.log
        assert "Traceback" not in server.log


def test_of_many_that_wait_the_oldest_goes(tiny_model: Path) -> None:
    program = HASTY.replace("KEEP_ALIVE_S = 1.0", "KEEP_ALIVE_S = 600.0")
    with (
        Server(tiny_model, program=program).wait_ready() as server,
        contextlib.ExitStack() as stack,
    ):
        connections = [stack.enter_context(talk(server)) for _ in range(3)]
        for s in connections:
            s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in read_until(s, b"}")
        (closed,), _, _ = select.select(connections, [], [], 60)
        assert closed.recv(1) == b""
        for s in {*connections} - {closed}:
            s.sendall(raw(ask(stream=True)))
            read_until(s, b"0\r\n\r\n")


def test_connections_that_wait_hold_up_no_end(tiny_model: Path) -> None:
    program = (
        """
from mlx_safe.server import health
health.ANSWER_TIMEOUT_S = 600.0
"""
        + CONTROLLED
    )
    with (
        Server(tiny_model, program=program).wait_ready() as server,
        contextlib.closing(server.connect()) as connection,
    ):
        connection.request("GET", "/health")
        connection.getresponse().read()
        assert server.stop() == 0
        assert connection.sock.recv(1) == b""


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_is_cut_looks_cut(tiny_model: Path, path: str) -> None:
    with Server(tiny_model, program=CONTROLLED).wait_ready() as server:
        server.hold(20)
        with talk(server) as s:
            s.sendall(raw(ask(stream=True, max_tokens=100, **PATHS[path])))
            server.wait_held(BATCH_RUNS_S)
            os.kill(server.process.pid, signal.SIGKILL)
            chunks, ended = unchunked(read_all(s))
    assert chunks
    assert not ended


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
def test_what_fails_before_the_first_token_has_its_status(
    server: Server, path: str, stream: bool
) -> None:
    """However much of the prompt has been read by then."""
    server.plan("prefill:5:8:persistent")
    body = ask("y" * 2000, stream=stream, **PATHS[path])
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", CHAT, json.dumps(body))
        response = connection.getresponse()
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        error = json.loads(response.read())["error"]
        assert error["code"] == "metal_out_of_memory"
        server.plan("any:1000000000:8")
        # The body was read: the connection is good.
        connection.request("POST", CHAT, json.dumps(ask()))
        assert connection.getresponse().status == 200


def test_a_failed_stream_ends_as_one(server: Server) -> None:
    server.plan("decode:20:8:persistent")
    with talk(server) as s:
        s.sendall(raw(ask(stream=True, max_tokens=100)))
        chunks, ended = unchunked(read_until(s, b"0\r\n\r\n"))
        server.plan("any:1000000000:8")
        assert ended
        assert b'"object": "error"' in chunks[-1]
        assert chunks[-1].endswith(b"data: [DONE]\n\n")
        s.sendall(raw(ask()))
        assert b" 200 " in read_until(s, b"\r\n\r\n")


def comments_in(answer: bytes) -> list[int]:
    """How far the prompt was read, as each comment tells."""
    lines = [x for x in answer.decode().splitlines() if x.startswith(": keepalive ")]
    return [int(line.split()[2].split("/")[0]) for line in lines]


@pytest.fixture(scope="module")
def slow(tiny_model: Path) -> Iterator[Server]:
    """Comments begin after two seconds."""
    more = ("--prefill-step-size", "64", "--keepalive-after", "2")
    with Server(tiny_model, *more, program=CONTROLLED).wait_ready() as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_comments_begin_when_it_takes_long(slow: Server, path: str) -> None:
    slow.hold(20)
    with talk(slow) as s:
        s.sendall(raw(ask(f"{path} " + "w" * 2000, stream=True, **PATHS[path])))
        slow.wait_held(2.5)
        # Neither they nor the 200: it can still be a 503.
        assert select.select([s], [], [], 0)[0] == []
        slow.go()
        answer = read_until(s, b"0\r\n\r\n")
    assert len(comments_in(answer)) >= 10
    assert comments_in(answer)[0] >= 19 * 64
    assert unchunked(answer)[1]


@pytest.mark.parametrize("path", PATHS)
def test_of_what_is_read_in_a_moment_there_are_none(server: Server, path: str) -> None:
    answer = server.post(ask(f"{path} " + "z" * 2000, stream=True, **PATHS[path]))
    assert answer.done and answer.text
    assert ": keepalive" not in answer.body


def test_the_time_for_comments_is_a_flag(tiny_model: Path) -> None:
    more = ("--prefill-step-size", "64", "--keepalive-after", "0")
    with Server(tiny_model, *more).wait_ready() as server:
        answer = server.post(ask("z" * 2000, stream=True))
        assert len(comments_in(answer.body.encode())) >= 2000 // 64
        assert answer.done and answer.text
