"""No request is lost: one answer, cut at each of its tokens.

The answer after the fault must be the undisturbed one: the pieces of a stream one
by one, tool calls, reasoning, log-probabilities, usage and the reason for its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mlx_safe._mlx_versions import parse_version
from support.clients import Said, ask_plain
from support.scripted_model import bias
from support.server import CONTROLLED, Server

TOKENS = 10
SEED = {"seed": 1}
SAMPLED = {"seed": 7, "temperature": 1.0}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}

# What a request asks for. All have a multi-byte character cut in two somewhere:
# each token of the tiny model is a byte.
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "repetition-short": {"repetition_penalty": 1.5, "repetition_context_size": 3},
    "presence": {"presence_penalty": 1.5, "presence_context_size": 100},
    "frequency": {"frequency_penalty": 0.7},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"65": 2.0, "66": -100.0},
    },
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 20},
    "min-p": {"min_p": 0.02},
}
if parse_version(version("mlx-lm")) >= (0, 32):  # 0.31.3 fails with a ValueError
    SAMPLERS["xtc"] = {"xtc_probability": 0.5, "xtc_threshold": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequential": SEED,
    **{f"batched-{name}": more for name, more in PENALTIES.items()},
    **{f"sequential-{name}": {**SEED, **more} for name, more in PENALTIES.items()},
    **{f"sampled-{name}": {**SAMPLED, **more} for name, more in SAMPLERS.items()},
    "sampled-repetition": {**SAMPLED, "repetition_penalty": 1.5},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "sequential-logprobs": {**SEED, "logprobs": True},
}
DRAFTED = {
    "plain": {},
    "repetition": PENALTIES["repetition"],
    "all": PENALTIES["all"],
    "sampled": SAMPLED,
    "sampled-top-p-repetition": {**SAMPLED, "top_p": 0.9, "repetition_penalty": 1.5},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=CONTROLLED) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def drafted(tiny_model: Path, draft_model: Path) -> Iterator[Server]:
    """Speculative decoding: all requests take the sequential path."""
    more = ("--draft-model", str(draft_model), "--num-draft-tokens", "2")
    with Server(tiny_model, *more, program=CONTROLLED) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def scripted(scripted_model: Path) -> Iterator[Server]:
    with Server(scripted_model, program=CONTROLLED) as server:
        yield server.wait_ready()


def cut(server: Server, body: dict[str, Any], every: int = 1) -> Said:
    """Fails decode step 1, 1 + ``every``, …; gives the undisturbed answer."""
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    expected = ask_plain(server, body)
    assert expected.error is None
    assert expected.usage
    # The prompt cache makes no difference either.
    before = server.ask("steps")
    assert_same(ask_plain(server, body), expected, "with the prompt cache")
    steps = server.ask("steps") - before
    replays = server.metric("mlx_safe_replays_total")
    cuts = range(1, steps + 1, every)
    for n in cuts:
        server.plan(f"decode:{n}:8")
        assert_same(ask_plain(server, body), expected, f"decode step {n} of {steps}")
    # The last step is computed ahead: nobody waits for its fault.
    found = server.metric("mlx_safe_replays_total") - replays
    assert found >= len([n for n in cuts if n < steps - 1])
    return expected


def assert_same(found: Said, expected: Said, where: str) -> None:
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        assert a["id"] == b["id"], where
        # The prompt is read in other pieces.
        assert math.isclose(a["logprob"], b["logprob"], abs_tol=1e-3), where
        for x, y in zip(
            a.get("top_logprobs", ()), b.get("top_logprobs", ()), strict=True
        ):
            assert x["id"] == y["id"], where
    found.logprobs = expected.logprobs
    assert found == expected, where
    assert found.deltas == expected.deltas, where


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["batched", "sequential"])
@pytest.mark.parametrize("kind", ["calls", "answers"])
def test_tool_call(scripted: Server, kind: str, path: str, stream: bool) -> None:
    """Thought, speech and call, begun by the model or (reasoning) by the prompt."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Count my birds."}]
    if kind == "answers":
        messages += [
            {"role": "assistant", "content": "I look."},
            {"role": "tool", "tool_call_id": "0", "content": "17 birds"},
        ]
    body = {
        "messages": messages,
        "tools": [TOOL],
        "max_tokens": 40,
        "stream": stream,
        "logit_bias": bias(scripted.model, call=kind == "calls"),
        **(SEED if path == "sequential" else {}),
    }
    answer = cut(scripted, body, 1 if stream and kind == "calls" else 4)
    assert answer.reasoning and answer.content.strip()
    assert answer.finish == ("tool_calls" if kind == "calls" else "stop")
    assert bool(answer.calls) == (kind == "calls")
    if stream:
        assert len(answer.deltas) > 8


@pytest.mark.parametrize("case", CASES)
def test_text(server: Server, case: str) -> None:
    body = question(stream="logprobs" not in case, **CASES[case])
    answer = cut(server, body, 3)
    assert bool(answer.logprobs) == ("logprobs" in case)


@pytest.mark.parametrize("case", DRAFTED)
def test_speculative_decoding(drafted: Server, case: str) -> None:
    body = question(stream="logprobs" not in case, **DRAFTED[case])
    cut(drafted, body, 2)


def question(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Which way?"}]
    return {"messages": messages, "max_tokens": TOKENS, **more}
