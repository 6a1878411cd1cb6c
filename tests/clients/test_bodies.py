"""What coding agents really send, with other texts: all of it is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server

BODIES = sorted((Path(__file__).parent / "bodies").glob("*.json"))
# Of opencode 1.18.33 (its main request, one for a title), cn 1.5.47, qwen-code 0.15.10.
COUNT = 4


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model).wait_ready() as server:
        yield server


@pytest.mark.parametrize("path", BODIES, ids=lambda p: p.stem)
def test_a_coding_agent_is_answered(server: Server, path: Path) -> None:
    assert len(BODIES) == COUNT
    body = {**json.loads(path.read_text()), "max_tokens": 8}
    answer = server.post(body)
    assert answer.status == 200, answer.body
    assert answer.done and not answer.error
    assert answer.text
    usage = [event["usage"] for event in answer.events if event.get("usage")]
    assert usage[-1]["completion_tokens"] == 8  # all of them ask for it
