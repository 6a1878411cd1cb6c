"""Clients that leave: within a step, on every path, quietly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import BATCH_RUNS_S, CONTROLLED, NEVER, Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
STEP_SIZE = 64
BYTES_PER_TOKEN = 512  # of the tiny model's KV cache
# The step in which the client leaves, of some 300 of the prompt or of its answer.
LEAVES_IN = {"prefill": (5, 300 * STEP_SIZE), "decode": (20, 5)}

# Nobody looks at sockets: that a client is gone shows when it is written to. And what
# ends mlx-lm's turn of its batch after half a second never does.
ONLY_WRITES = (
    """
import mlx_lm.server
from mlx_safe.server import disconnects
disconnects.Disconnects._run = lambda self: None
mlx_lm.server.TimeBudget.__init__.__defaults__ = (3600.0, 25, 10)
"""
    + CONTROLLED
)

# A write waits a second for a client that does not read, and not for what the
# system would keep for it.
IMPATIENT = program("impatient_with_readers")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    more = ("--prefill-step-size", str(STEP_SIZE), "--keepalive-after", "0")
    with Server(tiny_model, *more, program=CONTROLLED).wait_ready() as server:
        server.chat()
        yield server


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("path", PATHS)
def test_leaving(
    server: Server, path: str, phase: str, stream: bool, reset: bool
) -> None:
    step, length = LEAVES_IN[phase]
    messages = [{"role": "user", "content": "x" * length}]
    body = {"messages": messages, "max_tokens": 20_000, "stream": stream}
    seen = server.disconnects
    server.hold(step)
    with server.connected({**body, **PATHS[path]}, reset=reset):
        server.wait_held()
    # It is noticed while the step goes on.
    server.wait_for_log("outcome=client_left", seen + 1)
    assert server.metric("mlx_safe_requests_in_flight") == 0
    before = server.ask("steps")
    server.go()
    # The next one finds the way free.
    assert server.chat(**PATHS[path]).status == 200
    steps = server.ask("steps") - before
    assert steps <= 12  # the one it left in, and those for eight tokens
    assert server.disconnects == seen + 1
    assert "Traceback" not in server.log
    assert server.metric("mlx_safe_resets_total") == 0


@pytest.mark.parametrize("path", PATHS)
def test_leaving_is_noticed_by_a_write(tiny_model: Path, path: str) -> None:
    """Before anybody has looked; the request's memory is free afterwards."""
    messages = [{"role": "user", "content": "x" * 2000}]
    body = {"messages": messages, "max_tokens": 5000, "stream": True, **PATHS[path]}
    cacheless = ("--prompt-cache-size", "0")
    with Server(
        tiny_model, *cacheless, inject=f"any:{NEVER}", program=ONLY_WRITES
    ).wait_ready() as server:
        assert server.chat(**PATHS[path]).status == 200
        memory = server.ask("memory")
        server.hold(30)
        with server.connected(body, reset=True):
            server.wait_held()
        assert server.ask("memory") > memory + 2000 * BYTES_PER_TOKEN
        server.go()
        server.wait_for_log("outcome=client_left")
        before = server.ask("steps")
        assert server.chat(**PATHS[path]).status == 200
        steps = server.ask("steps") - before
        assert steps <= 12  # the one under way, and those for eight tokens
        most = memory + 500 * BYTES_PER_TOKEN
        assert eventually(lambda: server.ask("memory") < most)


@pytest.mark.parametrize("path", PATHS)
def test_keep_alive_comments_cannot_kill_the_handler(server: Server, path: str) -> None:
    """One client goes in the midst of them; another has them all, and its answer."""
    body = {"messages": [{"role": "user", "content": "y" * 3000}], "max_tokens": 8}
    body.update(stream=True, **PATHS[path])
    seen = server.disconnects
    server.hold(10)
    with server.connected(body, reset=True) as s:
        server.wait_held()
        got = b""
        while b": keepalive" not in got:
            piece = s.recv(1)
            assert piece, got
            got += piece
    server.go()
    messages = [{"role": "user", "content": f"{path} " + "z" * 3000}]
    answer = server.post({**body, "messages": messages})
    assert answer.done and answer.text
    comments = [x for x in answer.body.splitlines() if x.startswith(": keepalive")]
    assert len(comments) >= 3000 // STEP_SIZE
    server.wait_for_log("outcome=client_left", seen + 1)
    assert server.disconnects == seen + 1
    assert server.metric("mlx_safe_requests_in_flight") == 0
    assert "Traceback" not in server.log
    assert "a handler failed" not in server.log


def test_a_client_that_reads_no_more_has_left(tiny_model: Path) -> None:
    """It is there, but nothing can be written to it."""
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "max_tokens": 100_000, "stream": True}
    with Server(tiny_model, program=IMPATIENT).wait_ready() as server:
        with server.connected(body):
            server.wait_for_log("outcome=client_left")
            assert server.metric("mlx_safe_requests_in_flight") == 0
            left = "mlx_safe_requests_total"
            assert server.metric(left, outcome="client_left") == 1
            assert server.metric("mlx_safe_requests_total") == 1
        assert "could not be read" not in server.log
        assert "Traceback" not in server.log


def test_others_in_the_batch_go_on(server: Server) -> None:
    (alone,) = server.chats(1, max_tokens=600)
    seen = server.disconnects
    server.hold(100)
    with server.chatting(1, max_tokens=600) as stays:
        server.wait_held(BATCH_RUNS_S)
        with contextlib.ExitStack() as leavers:
            for i in range(3):
                messages = [{"role": "user", "content": f"leaver {i}"}]
                body = {"messages": messages, "max_tokens": 20_000}
                leavers.enter_context(server.connected(body))
            server.wait_for_clients(4)
            server.hold(50)
            server.go()
            server.wait_held()
            assert server.metric("mlx_safe_requests_in_flight") == 4
        server.wait_for_log("outcome=client_left", seen + 3)
        server.go()
    assert stays[0].text == alone.text
