"""A draft model makes answers faster, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.models import make_model
from support.server import CONTROLLED, Server, free_port
from test_server_start import assert_one_clear_line, serve

# Types whose caches are of every kind that mlx-lm has, and what comes of them. Their
# windows are of 32 tokens.
REFUSED = {
    "gemma3_text": "RotatingKVCache",
    "gpt_oss": "RotatingKVCache",
    "afmoe": "RotatingKVCache",
    "gemma4_text": "share caches",
    "qwen3_next": "ArraysCache",
    "qwen3_5": "ArraysCache",
    "mamba2": "ArraysCache",
    "lfm2": "ArraysCache",
    "falcon_h1": "ArraysCache",
    "kimi_linear": "ArraysCache",
    "baichuan_m1": "ArraysCache, RotatingKVCache",
    "llama4": "ChunkedKVCache",
}
EXACT = ["llama", "deepseek_v3", "llama4_text"]

OTHER_VOCABULARIES = ["llama:100", "llama:600", "llama:1000"]


@pytest.fixture(scope="module")
def types(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each of these types."""
    wanted = [*REFUSED, *EXACT, *OTHER_VOCABULARIES]
    directory = tmp_path_factory.mktemp("types")
    return make_model("model_types.py", directory, str(tiny_model), *wanted)


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model) as running:
        yield running.wait_ready()


def asked(server: Server, **more: Any) -> str:
    """A greedy answer of the sequential path, which is that of drafts."""
    answer = server.chat(max_tokens=40, temperature=0, seed=1, **more)
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] == 40
    return answer.text


def assert_exact(
    server: Server, model: Path, draft: Path, *bodies: dict[str, Any]
) -> None:
    """With a draft as without it, for each of the bodies."""
    alone = [asked(server, model=str(model), **body) for body in bodies]
    names = {"model": str(model), "draft_model": str(draft)}
    assert [asked(server, **names, **body) for body in bodies] == alone
    assert len(set(alone)) == len(bodies)  # what is in the bodies arrives


@pytest.mark.parametrize("kind", EXACT)
def test_a_target_that_takes_tokens_back(
    server: Server, types: Path, draft_model: Path, kind: str
) -> None:
    """One draft that is mostly wrong, and one that is always right."""
    for draft in (draft_model, types / kind):
        assert_exact(server, types / kind, draft, {})


@pytest.mark.parametrize("kind", REFUSED)
def test_a_target_that_does_not(
    server: Server, types: Path, draft_model: Path, kind: str
) -> None:
    names = {"model": str(types / kind), "draft_model": str(draft_model)}
    before = server.log.count("room for")
    failures = server.metric("mlx_safe_generation_failures_total")
    for way in ({}, {"seed": 1, "stream": True}):
        told = server.chat(**names, **way)
        assert told.status == 400, told.body
        assert told.error["param"] == "draft_model"
        assert told.error["code"] == "invalid_request"
        assert REFUSED[kind] in told.error["message"]
    # What was loaded stays loaded.
    assert server.log.count("room for") == before > 0
    # A client's mistake is no failure of the server's.
    assert server.metric("mlx_safe_generation_failures_total") == failures
    assert "Traceback" not in server.log


def test_a_target_that_does_not_is_known_at_once(
    types: Path, draft_model: Path
) -> None:
    """Of the model that is loaded it is known before: nobody waits for a turn."""
    target = types / "gemma3_text"
    with Server(target, program=CONTROLLED).wait_ready() as server:
        server.hold(3)
        with server.chatting(1, seed=1):
            server.wait_held()
            told = server.chat(draft_model=str(draft_model))
            assert (told.status, told.error["param"]) == (400, "draft_model")
            assert REFUSED["gemma3_text"] in told.error["message"]
            assert server.ask("hold") == 0, "the other is still in its step"
            server.go()
        assert server.chat().status == 200


@pytest.mark.parametrize("kind", ["gemma3_text", "mamba2"])
def test_refused_at_the_start(types: Path, draft_model: Path, kind: str) -> None:
    models = ("--model", str(types / kind), "--draft-model", str(draft_model))
    done = serve(*models, "--port", str(free_port()))
    said = "No draft model can be used with this model"
    assert_one_clear_line(done, f"--draft-model {draft_model}", said, REFUSED[kind])


@pytest.mark.parametrize("vocabulary", [100, 1000])
def test_a_draft_with_another_vocabulary(
    server: Server, types: Path, tiny_model: Path, vocabulary: int
) -> None:
    """The target has 262 tokens. Penalties and biases are the draft's as well."""
    draft = types / f"llama:{vocabulary}"
    bodies: list[dict[str, Any]] = [
        {},
        {"logit_bias": {"261": 3.0, "5": 4.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    ]
    assert_exact(server, tiny_model, draft, *bodies)
    told = server.chat(draft_model=str(draft), logit_bias={"262": 50.0})
    assert (told.status, told.error["param"]) == (400, "logit_bias")


def test_a_target_with_more_tokens_than_its_draft(server: Server, types: Path) -> None:
    """What it says the draft cannot read."""
    bias = {"logit_bias": {str(token): 9.0 for token in range(590, 600)}}
    assert_exact(server, types / "llama:600", types / "llama:100", bias)


def test_the_draft_of_the_command_line(
    tiny_model: Path, draft_model: Path, types: Path
) -> None:
    """It is the draft of the model of the command line, and of no other."""
    with Server(tiny_model, "--draft-model", str(draft_model)) as server:
        server.wait_ready()
        assert server.chat().status == 200
        told = server.chat(model=str(types / "gemma3_text"))
        assert told.status == 200, told.body
        named = {"model": str(types / "gemma3_text"), "draft_model": str(draft_model)}
        told = server.chat(**named)
        assert (told.status, told.error["param"]) == (400, "draft_model")
        assert server.chat().status == 200
