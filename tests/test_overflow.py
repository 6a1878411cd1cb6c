"""Prompts that are too long: refused, or cut so that they still read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_safe._command import CommandError
from mlx_safe.server.overflow import Overflow, Truncation, shortenings
from mlx_safe.server.replies import ContextTooLong
from support import child
from support.programs import program
from support.server import CONTROLLED, Answer, Server, eventually

Message = dict[str, Any]

# -- the cut itself -----------------------------------------------------------------


def request(messages: list[Message]) -> Any:
    return SimpleNamespace(request_type="chat", messages=messages, prompt=None)


def read(request: Any) -> tuple[list[int], list[list[int]], str]:
    """Stands for mlx-lm's `_tokenize`: as many tokens as there is text."""
    prompt = list(request.prompt or [])
    for message in request.messages or []:
        prompt += [message["number"]] * (2 + message["length"])
        message["content"] = "changed"  # as mlx-lm does
    return prompt, [prompt], "normal"


def encode(text: str) -> list[int]:
    """A tokenizer that puts 98 before every text and 99 behind it."""
    return [98, *map(ord, text), 99]


def said(role: str, length: int = 3, **more: Any) -> Message:
    return {"role": role, "length": length, **more}


@st.composite
def steps(draw: st.DrawFn, ids: bool) -> list[Message]:
    """An answer, perhaps with calls of tools and what they gave."""
    calls = draw(st.integers(0, 3))
    if not calls:
        return [said("assistant", draw(st.integers(0, 9)))]
    # Some clients begin to count anew each time.
    names = [f"call_{i}" for i in range(calls)]
    results = [said("tool", draw(st.integers(0, 9)), tool_call_id=n) for n in names]
    if not ids:
        results = [said("tool", r["length"]) for r in results]
    call = said("assistant", 1, tool_calls=[{"id": n} for n in names])
    return [call, *draw(st.permutations(results))]


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    ids = draw(st.booleans())
    chat = [said("system", draw(st.integers(0, 9))) for _ in range(draw(SMALL))]
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.integers(0, 5)):
            chat.append(said("user", draw(st.integers(0, 9))))
        for _ in range(draw(SMALL)):
            chat += draw(steps(ids))
    chat = chat or [said("user")]
    return [{**m, "number": i} for i, m in enumerate(chat)]


SMALL = st.integers(0, 2)


def owner(messages: list[Message], result: int) -> int:
    """Which message made the call: the last before that has its name, or calls."""
    name = messages[result].get("tool_call_id")
    for i in range(result - 1, -1, -1):
        calls = messages[i].get("tool_calls") or []
        if any(name in (None, c["id"]) for c in calls):
            return i
    raise AssertionError("a result without a call")


@given(chats(), st.integers(1, 120), st.integers(0, 40))
def test_what_stays_is_whole(chat: list[Message], limit: int, keep: int) -> None:
    overflow = Overflow(limit, "truncate", min(keep, limit - 1))
    before = [dict(m) for m in chat]
    try:
        found, cut = overflow.fit(request([dict(m) for m in chat]), read, encode)
    except ContextTooLong:
        # Not even the shortest way fits.
        ways = shortenings(before, 0)
        assert not any(_length(before, w) <= limit for w in ways if _keeps(before, w))
        return
    assert len(found[0]) <= limit
    kept = [i for i in range(len(chat)) if i in set(found[0])]
    assert found[0] == [t for i in kept for t in read(request([before[i]]))[0]]
    if cut is None:
        assert kept == list(range(len(chat)))
        return
    assert cut == Truncation(
        _length(before, range(len(chat))), len(found[0]), len(chat) - len(kept)
    )
    assert _keeps(before, kept)
    for i, message in enumerate(before):
        if message["role"] == "tool":
            assert (i in kept) == (owner(before, i) in kept), kept


def _length(messages: list[Message], kept: Any) -> int:
    return len(read(request([dict(messages[i]) for i in kept]))[0])


def _keeps(messages: list[Message], kept: Any) -> bool:
    """The system prompt, the last message of the user, and the last of all."""
    roles = [m["role"] for m in messages]
    system = next((i for i, r in enumerate(roles) if r != "system"), len(roles))
    users = [i for i, r in enumerate(roles) if r == "user"]
    return {*range(system), *users[-1:], len(roles) - 1} <= set(kept)


def test_the_oldest_turns_go_and_the_beginning_is_steady() -> None:
    chat = [said("system")]
    begins = []
    for turn in range(60):
        chat += [said("user"), said("assistant")]
        asked = [{**m, "number": i} for i, m in enumerate([*chat, said("user")])]
        found, cut = Overflow(200, "truncate").fit(request(asked), read, encode)
        assert len(found[0]) > 150 or cut is None
        assert found[0][0] == 0 and found[0][5] % 2 == 1  # system, then a user
        begins.append(found[0][5])
        assert found[0][-1] == 2 * turn + 3
    # The prompt cache can have what a request has in common with the one before.
    same = sum(a == b for a, b in itertools.pairwise(begins))
    assert same >= 35
    assert begins == sorted(begins)


def test_the_steps_of_the_last_turn_go_when_nothing_else_is_left() -> None:
    """An agent's session is one question and a hundred calls."""
    chat = [said("system"), said("user"), said("assistant"), said("user", 10)]
    for i in range(30):
        call = said("assistant", 1, tool_calls=[{"id": f"c{i}"}])
        chat += [call, said("tool", 5, tool_call_id=f"c{i}")]
    chat = [{**m, "number": i} for i, m in enumerate(chat)]
    found, cut = Overflow(100, "truncate").fit(request(chat), read, encode)
    kept = sorted(set(found[0]))
    assert kept[:2] == [0, 3]
    assert kept[2:] == list(range(kept[2], len(chat)))
    assert chat[kept[2]]["role"] == "assistant"
    assert cut is not None and 85 <= cut.after <= 100


def test_messages_of_the_beginning_stay_if_asked_for() -> None:
    chat = [said("system"), *[said("user"), said("assistant")] * 20, said("user")]
    chat = [{**m, "number": i} for i, m in enumerate(chat)]
    found, _ = Overflow(100, "truncate", 27).fit(request(chat), read, encode)
    kept = sorted(set(found[0]))
    assert kept[:6] == [0, 1, 2, 3, 4, kept[5]]  # 5 + 4 * 5 = 25 tokens
    assert kept[5] > 5 and chat[kept[5]]["role"] == "user"


def test_a_text_is_cut_by_tokens() -> None:
    text = SimpleNamespace(request_type="text", messages=None, prompt=range(100))
    found, cut = Overflow(30, "truncate", 10).fit(text, read, encode)
    assert found[0] == [*range(10), *range(80, 100)]
    assert found[1:] == ([found[0]], "normal")
    assert str(cut) == "cut from 100 to 30 tokens"
    cut_at_once = Overflow(30, "truncate").fit(text, read, encode)
    assert cut_at_once[0][0] == list(range(70, 100))


@pytest.mark.parametrize("keep", [0, 1, 10])
def test_a_text_keeps_what_the_tokenizer_puts_before_it(keep: int) -> None:
    text = SimpleNamespace(request_type="text", messages=None, prompt=[98, *range(90)])
    found, _ = Overflow(30, "truncate", keep).fit(text, read, encode)
    kept = max(1, keep)
    assert found[0] == [98, *range(kept - 1), *range(60 + kept, 90)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None, "truncate", 0), "need --max-prompt-tokens"),
        ((None, "error", 5), "need --max-prompt-tokens"),
        ((10, "error", 5), "needs --prompt-overflow-policy truncate"),
        ((10, "truncate", 10), "must be less than --max-prompt-tokens 10"),
    ],
)
def test_flags_that_do_not_go_together(arguments: Any, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        Overflow(*arguments)


def test_bad_values_are_one_clear_line(tiny_model: Path) -> None:
    """In one child: the flags are read before anything is loaded."""
    truncate = ("--prompt-overflow-policy", "truncate")
    bad = [
        ("--max-prompt-tokens", "0"),
        ("--max-prompt-tokens", "many"),
        ("--prompt-overflow-policy", "cut"),
        ("--prompt-keep-tokens", "-1"),
        ("--max-kv-size", "3"),
        ("--prompt-keep-tokens", "9", "--max-prompt-tokens", "9", *truncate),
        ("--max-kv-size", "64", "--draft-model", str(tiny_model)),
        ("--prompt-cache-size", "-1"),
        # mlx-lm would take requests and never begin with them.
        ("--prompt-concurrency", "0"),
        ("--decode-concurrency", "0"),
    ]
    ran = child.run(program("refuses_flags"), tiny_model, *map(json.dumps, bad))
    lines = ran.stdout.strip().splitlines()
    assert len(lines) == len(bad), ran.stderr
    for flags, line in zip(bad, lines, strict=True):
        assert line.startswith("2 "), line
        assert flags[0] in line, line


# -- the real server ------------------------------------------------------------------

LIMIT = 120
STORED = "mlx_safe_prompt_cache_bytes"
PATHS = {"batched": {}, "sequential": {"seed": 1}}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    flags = ["--max-prompt-tokens", str(LIMIT), "--prompt-overflow-policy", "truncate"]
    flags += ["--prompt-keep-tokens", "20"]
    with Server(tiny_model, *flags, program=CONTROLLED) as server:
        yield server.wait_ready()


def prompt_tokens(answer: Answer) -> int:
    return int(answer.json["usage"]["prompt_tokens"])


def long_chat(turns: int) -> list[Message]:
    chat = [{"role": "system", "content": "You are terse."}]
    for i in range(turns):
        chat.append({"role": "user", "content": f"Question {i}?"})
        chat.append({"role": "assistant", "content": f"Answer {i}."})
    return [*chat, {"role": "user", "content": "Last?"}]


@pytest.mark.parametrize("path", PATHS)
def test_a_long_chat_is_cut_and_answered(server: Server, path: str) -> None:
    ask = {"max_tokens": 6, **PATHS[path]}
    cuts = server.metric("mlx_safe_prompts_truncated_total")
    cut = server.post({"messages": long_chat(20), **ask})
    assert cut.status == 200
    assert LIMIT * 3 // 4 < prompt_tokens(cut) <= LIMIT
    assert server.metric("mlx_safe_prompts_truncated_total") == cuts + 1
    told = cut.headers["x-prompt-truncated"]
    assert told.endswith("messages left out")
    assert eventually(lambda: f"a prompt was {told}" in server.log)
    # It is the answer to what is left.
    left = 20 - int(told.split()[-4]) // 2
    chat = long_chat(20)
    short = [*chat[:1], *chat[1 + 2 * (20 - left) :]]
    again = server.post({"messages": short, **ask})
    assert (again.text, prompt_tokens(again)) == (cut.text, prompt_tokens(cut))
    assert "x-prompt-truncated" not in again.headers
    streamed = server.post({"messages": long_chat(20), "stream": True, **ask})
    assert (streamed.text, streamed.done) == (cut.text, True)
    assert streamed.headers["x-prompt-truncated"] == told


@pytest.mark.parametrize("path", PATHS)
def test_a_replay_goes_on_from_the_same_cut(server: Server, path: str) -> None:
    ask = {"messages": long_chat(15), "max_tokens": 6, **PATHS[path]}
    calm = server.post(ask)
    cuts = server.metric("mlx_safe_prompts_truncated_total")
    server.plan("decode:4:8")
    faulty = server.post(ask)
    assert (faulty.text, prompt_tokens(faulty)) == (calm.text, prompt_tokens(calm))
    assert server.metric("mlx_safe_prompts_truncated_total") == cuts + 1


@pytest.mark.parametrize("path", PATHS)
def test_a_long_text_is_cut(server: Server, path: str) -> None:
    def complete(prompt: str) -> Answer:
        body = {"prompt": prompt, "max_tokens": 6, **PATHS[path]}
        return server.post(body, "/v1/completions")

    text = "".join(chr(97 + i % 26) for i in range(500))
    cut = complete(text)
    assert prompt_tokens(cut) == LIMIT
    assert complete(text[:20] + text[-100:]).text == cut.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_last_message_that_cannot_fit(
    server: Server, path: str, stream: bool
) -> None:
    refused = server.chat("x" * 300, stream=stream, **PATHS[path])
    assert refused.status == 400
    assert refused.error["code"] == "context_length_exceeded"
    assert refused.error["type"] == "invalid_request_error"
    assert "Traceback" not in server.log


def test_without_truncate_it_is_refused_and_the_window_holds(tiny_model: Path) -> None:
    """Also ``--max-kv-size``, to start one server less."""
    window, token = 64, 2 * 2 * 2 * 16 * 4
    flags = ["--max-prompt-tokens", "600", "--max-kv-size", str(window)]
    flags += ["--prompt-cache-size", "1", "--prefill-step-size", "32"]
    with Server(tiny_model, *flags) as limited, Server(tiny_model) as free:
        limited.wait_ready()
        free.wait_ready()
        for more in PATHS.values():
            refused = limited.chat("x" * 700, **more)
            assert refused.status == 400
            assert refused.error["code"] == "context_length_exceeded"
            # Inside the window nothing is different.
            assert limited.chat("short", **more).text == free.chat("short", **more).text
            long = limited.chat("long " * 100, max_tokens=40, **more)
            assert (long.status, prompt_tokens(long) > 500) == (200, True)
            # The one entry is what the request's cache was at its end.
            assert eventually(lambda: limited.metric(STORED) == window * token)
        # Several at once, of different lengths, beyond the window.
        for answer in limited.chats(4, max_tokens=80):
            assert answer.status == 200
            assert answer.json["usage"]["completion_tokens"] == 80
        assert "Traceback" not in limited.log
