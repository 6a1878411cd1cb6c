"""Clients that leave: within a step, on every path, quietly."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, "--prefill-step-size", "64").wait_ready() as server:
        server.chat()
        yield server


def leave(server: Server, reset: bool, **ask: Any) -> None:
    """Sends a request, waits until it is worked on, and goes."""
    body = json.dumps(ask).encode()
    s = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with s:
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}"
        s.sendall(head.encode() + b"\r\n\r\n" + body)
        server.wait_for_requests(1)
        if reset:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("path", PATHS)
def test_leaving(
    server: Server, path: str, phase: str, stream: bool, reset: bool
) -> None:
    text = "x" * (60_000 if phase == "prefill" else 5)
    seen = server.log.count("went away")
    leave(
        server,
        reset,
        messages=[{"role": "user", "content": text}],
        max_tokens=20_000,
        stream=stream,
        **PATHS[path],
    )
    gone = time.monotonic()
    while server.metric("mlx_safe_requests_in_flight") > 0:
        assert time.monotonic() < gone + 10, "still in flight"
        time.sleep(0.005)
    # The whole would have taken much longer; the next one finds the way free.
    assert server.chat(timeout=20, **PATHS[path]).status == 200
    assert time.monotonic() - gone < 8
    eventually(lambda: server.log.count("went away") > seen)
    assert server.log.count("went away") == seen + 1
    assert "Traceback" not in server.log
    assert server.metric("mlx_safe_resets_total") == 0


@pytest.mark.parametrize("path", PATHS)
def test_keep_alive_comments_cannot_kill_the_handler(server: Server, path: str) -> None:
    """One client goes in the midst of them; another has them all, and its answer."""
    body = {"messages": [{"role": "user", "content": "y" * 3000}], "max_tokens": 8}
    body.update(stream=True, **PATHS[path])
    raw = json.dumps(body).encode()
    seen = server.log.count("went away")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(raw)}"
        s.sendall(head.encode() + b"\r\n\r\n" + raw)
        got = b""
        while b": keepalive" not in got:
            piece = s.recv(1)
            assert piece, got
            got += piece
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    messages = [{"role": "user", "content": f"{path} " + "z" * 3000}]
    answer = server.post({**body, "messages": messages})
    assert answer.done and answer.text
    comments = [x for x in answer.body.splitlines() if x.startswith(": keepalive")]
    assert len(comments) >= 3000 // 64
    eventually(lambda: server.log.count("went away") > seen)
    assert server.log.count("went away") == seen + 1
    assert server.metric("mlx_safe_requests_in_flight") == 0
    assert "Traceback" not in server.log
    assert "a handler failed" not in server.log


def test_others_in_the_batch_go_on(server: Server) -> None:
    alone = server.chat("the one who stays", max_tokens=600).text
    import threading

    stays: list[str] = []
    thread = threading.Thread(
        target=lambda: stays.append(
            server.chat("the one who stays", max_tokens=600).text
        )
    )
    thread.start()
    for i in range(3):
        leave(
            server,
            False,
            messages=[{"role": "user", "content": f"leaver {i}"}],
            max_tokens=20_000,
        )
    thread.join(60)
    assert stays == [alone]
