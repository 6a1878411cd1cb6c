"""A step that neither ends nor fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.server import Server


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_a_stall_is_fatal_and_told(tiny_model: Path, more: dict[str, int]) -> None:
    with Server(
        tiny_model, "--stall-timeout", "1.5", inject="decode:5:0:once:stall"
    ).wait_ready() as server:
        answer = server.chat(timeout=20, **more)
        assert answer.status == 503
        assert answer.error["code"] == "unavailable"
        assert "no progress for 1.5 s" in answer.error["message"]
        assert server.wait() == 75
        assert "all stacks follow" in server.log
        assert "in step" in server.log  # where it hangs, by name


def test_a_long_answer_is_no_stall(tiny_model: Path) -> None:
    with Server(tiny_model, "--stall-timeout", "0.5").wait_ready() as server:
        assert server.chat(max_tokens=1500).status == 200
        assert server.process.poll() is None


def test_without_it_nothing_is_noticed(tiny_model: Path) -> None:
    with Server(
        tiny_model, "--stall-timeout", "0", inject="decode:5:0:once:stall"
    ).wait_ready() as server:
        assert server.chat(timeout=4).broken
        assert server.process.poll() is None
