"""How many tokens a model was made for, and what happens to more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.memory.context import context_tokens
from support.server import Answer, Server

CONTEXT = 300
TOO_LONG = (
    "The prompt is too long: {} tokens. This model's maximum context length is {} "
    "tokens."
)
PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}


@pytest.mark.parametrize(
    ("config", "tokenizer_max", "expected"),
    [
        ({"max_position_embeddings": 8192}, 2048, 8192),
        ({"text_config": {"max_position_embeddings": 4096}}, None, 4096),
        (
            {"thinker_config": {"text_config": {"max_position_embeddings": 32768}}},
            None,
            32768,
        ),
        ({"n_positions": 1024}, None, 1024),
        ({}, 2048, 2048),
        ({}, 1000000000000000019884624838656, None),
        ({}, None, None),
        ({"max_position_embeddings": None}, "many", None),
        # Qwen 2.5 with YaRN names the length before it, DeepSeek the one after it.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            None,
            131072,
        ),
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "original_max_position_embeddings": 4096,
                },
            },
            None,
            163840,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            None,
            131072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            None,
            16384,
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {
                    "max_position_embeddings": 131072,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                },
            },
            None,
            131072,
        ),
    ],
)
def test_what_a_model_was_made_for(
    config: dict[str, Any], tokenizer_max: Any, expected: int | None
) -> None:
    assert context_tokens(config, tokenizer_max) == expected


def test_a_state_space_has_no_end() -> None:
    config = {"max_position_embeddings": 2048}
    assert context_tokens(config, 2048, attends=False) is None


@pytest.fixture(scope="module")
def short_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made for `CONTEXT` tokens only."""
    directory = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def server(short_model: Path) -> Iterator[Server]:
    with Server(short_model).wait_ready() as server:
        yield server


def assert_too_long(answer: Answer, tokens: int | str, param: str) -> None:
    assert answer.status == 400
    assert answer.error == {
        "message": TOO_LONG.format(tokens, CONTEXT),
        "type": "invalid_request_error",
        "param": param,
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context(server: Server, path: str, stream: bool) -> None:
    more = {**PATHS[path], "stream": stream}
    # Two tokens of the template before the text, and two after it.
    assert_too_long(server.chat("x" * 400, **more), 403, "messages")
    body = {"prompt": "x" * 301, "max_tokens": 4, **more}
    assert_too_long(server.post(body, "/v1/completions"), 301, "prompt")
    # So long that its tokens are not even counted.
    found = server.chat("x" * 100_000, **more)
    assert found.error["code"] == "context_length_exceeded"
    assert found.error["message"].startswith("The prompt is too long: at least ")
    assert server.chat("short", **more).status == 200


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_ends_with_the_context(server: Server, path: str) -> None:
    body = {"prompt": "x" * 290, "max_tokens": 500, **PATHS[path]}
    answer = server.post(body, "/v1/completions")
    assert answer.status == 200
    assert answer.json["usage"]["total_tokens"] == CONTEXT
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_the_log_says_what_the_model_takes(server: Server) -> None:
    assert f"tokens, of which the model takes {CONTEXT}; the ceiling is" in server.log


def test_a_flag_holds_where_it_lets_more_in(short_model: Path) -> None:
    with Server(short_model, "--max-prompt-tokens", "500").wait_ready() as server:
        assert "--max-prompt-tokens 500 is more than the 300 tokens" in server.log
        assert server.chat("x" * 400).status == 200
        refused = server.chat("x" * 600)
        assert refused.error["message"] == TOO_LONG.format(603, 500)
