"""A step that neither ends nor fails."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from support.programs import program
from support.server import CONTROLLED, NEVER, Server

# The protected server; each step of its model takes a hundredth of a second or more.
SLOW = program("slow_steps")


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_a_stall_is_fatal_and_told(tiny_model: Path, more: dict[str, int]) -> None:
    with Server(
        tiny_model, "--stall-timeout", "3", inject="decode:5:0:once:stall"
    ).wait_ready() as server:
        answer = server.chat(**more)
        assert answer.status == 503
        assert answer.error["code"] == "unavailable"
        assert "no progress for 3 s" in answer.error["message"]
        assert server.wait() == 75
        assert "all stacks follow" in server.log
        assert re.search(r"no progress for 3 s \(decode for chatcmpl-", server.log)
        assert "in step" in server.log  # where it hangs, by name


def test_a_stall_is_noticed_when_its_client_has_left(tiny_model: Path) -> None:
    """Nobody waits for the step any more, but nobody else would be served."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
    stalls = ("--stall-timeout", "4")
    with Server(tiny_model, *stalls, program=CONTROLLED).wait_ready() as server:
        server.hold(5)
        with server.connected(body):
            server.wait_held()
        assert server.wait() == 75
        assert server.disconnects == 1
        assert "no progress for 4 s" in server.log


def test_a_long_answer_is_no_stall(tiny_model: Path) -> None:
    with Server(
        tiny_model, "--stall-timeout", "2", program=SLOW, inject=f"any:{NEVER}"
    ).wait_ready() as server:
        began = time.monotonic()
        assert server.chat(max_tokens=300).status == 200
        assert time.monotonic() - began > 2, "it had no time to be taken for a stall"
        assert server.process.poll() is None


def test_without_it_nothing_is_noticed(tiny_model: Path) -> None:
    with Server(
        tiny_model, "--stall-timeout", "0", inject="decode:5:0:once:stall"
    ).wait_ready() as server:
        assert server.chat(timeout=2).broken
        assert server.process.poll() is None
