"""Stop words end an answer, in whatever tokens the model writes them.

The scripted model says " The old one:€3", in tokens such as " one:" and the three
bytes of "€"; a stop word alone would be other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import CONTROLLED, Answer, Server

PATHS: dict[str, dict[str, Any]] = {
    "batched": {"max_tokens": 60},
    "sequential": {"max_tokens": 60, "seed": 1},
}


@pytest.fixture(scope="module")
def server(scripted_model: Path) -> Iterator[Server]:
    with Server(scripted_model, program=CONTROLLED) as server:
        server.wait_ready()
        yield server


def finish(answer: Answer) -> str:
    events = [e for e in answer.events or [answer.json] if e["choices"]]
    said: str = events[-1]["choices"][0]["finish_reason"]
    return said


def thought(answer: Answer) -> str:
    parts = [e["choices"][0] for e in answer.events or [answer.json] if e["choices"]]
    return "".join(
        (p.get("message") or p["delta"]).get("reasoning_content") or "" for p in parts
    )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", PATHS)
def test_an_answer_ends_before_its_first_stop_word(
    server: Server, path: str, stream: bool
) -> None:
    def chat(**more: Any) -> Answer:
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        answer = server.chat("of ships", stream=stream, **PATHS[path], **usage, **more)
        assert answer.status == 200 and answer.error is None, answer.body
        return answer

    whole = chat()
    text = whole.text
    assert "one:€" in text
    for word in [
        "one",
        "ne:",
        " one:",
        "e:€",
        "€",
        ":€" + text[-1],
        text[-1],
        text[:3],
    ]:
        answer = chat(stop=word)
        assert answer.text == text[: text.index(word)], word
        assert finish(answer) == "stop"
        assert thought(answer) == thought(whole)
    # Of many the first, and the model makes no more than a token after it.
    answer = chat(stop=[text[-1], "nowhere", "ne:"])
    assert answer.text == text[: text.index("ne:")]
    used, all_used = (
        (a.events[-1] if stream else a.json)["usage"]["completion_tokens"]
        for a in (answer, whole)
    )
    assert used <= all_used - 4
    # What is no stop word in the end is not lost with it.
    for word in [text[-1] + "x", text + "x", "nowhere"]:
        answer = chat(stop=word)
        assert (answer.text, finish(answer)) == (text, finish(whole)), word
    # A thought ends with it as well, as it does without markers.
    first = thought(whole).split()[0]
    answer = chat(stop=first[1:])
    assert (thought(answer), answer.text) == (first[:1], "")


@pytest.mark.parametrize("path", PATHS)
def test_a_stop_word_across_a_fault(server: Server, path: str) -> None:
    whole = server.chat("of ships", **PATHS[path])
    tokens = whole.json["usage"]["completion_tokens"]
    for step in range(1, tokens):
        server.plan(f"decode:{step}:8")
        answer = server.chat("of ships", stop="e:€", **PATHS[path])
        assert answer.status == 200, answer.body
        assert answer.text == whole.text[: whole.text.index("e:€")], step
        assert finish(answer) == "stop"
    server.plan("")


def test_each_choice_has_its_own_end(server: Server) -> None:
    answer = server.chat("of ships", stop="ne:", n=2, max_tokens=60)
    texts = [choice["message"]["content"] for choice in answer.json["choices"]]
    assert len(texts) == 2 and all(text.endswith(" o") for text in texts)
    plain = server.chat("of ships", max_tokens=60)
    assert "one:" in plain.text  # nobody else's
