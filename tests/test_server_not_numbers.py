"""A model whose values are too large for float16 is an error, and no answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from support.programs import program
from support.server import CONTROLLED, Server

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
CODE = "model_not_a_number"


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("too-large")
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights: Any = mx.load(str(tiny_model / "model.safetensors"))
    for name, weight in weights.items():
        scale = 1000 if "mlp" in name else 1
        weights[name] = (weight * scale).astype(mx.float16)
    path = str(directory / "model.safetensors")
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})
    with Server(directory) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_whole_answer(server: Server, path: str, tokens: int, logprobs: bool) -> None:
    before = server.metric("mlx_safe_generation_failures_total", code=CODE)
    wishes = {**PATHS[path], "logprobs": logprobs, "max_tokens": tokens}
    answer = server.chat("hello", **wishes)
    assert answer.status == 500
    assert answer.error["code"] == CODE
    assert "float16" in answer.error["message"]
    after = server.metric("mlx_safe_generation_failures_total", code=CODE)
    assert after == before + 1
    assert server.is_well()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream(server: Server, path: str) -> None:
    answer = server.chat("hello", stream=True, max_tokens=20, **PATHS[path])
    assert answer.error["code"] == CODE
    assert answer.done
    assert len(answer.events) <= 3  # the first token may have gone out
    assert server.is_well()


# A log-probability that was asked for is taken for NaN, once its run has failed.
POISON = program("poisons_log_probabilities")


@pytest.mark.parametrize("path", PATHS)
def test_what_a_failed_run_has_computed_decides_nothing(
    tiny_model: Path, path: str
) -> None:
    wishes = {**PATHS[path], "temperature": 0, "max_tokens": 12}
    with Server(tiny_model, program=POISON + CONTROLLED) as server:
        server.wait_ready()
        plain = server.chat("hello", **wishes)
        for step in (2, 3, 4):
            server.plan(f"decode:{step}:8")
            answer = server.chat("hello", **wishes)
            assert answer.status == 200, (answer, server.log)
            assert answer.text == plain.text
        assert "poisoned: 1" in server.log
