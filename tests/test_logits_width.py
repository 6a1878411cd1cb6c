"""Token ids that a client sends: those that the model has, whatever type it is of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import child
from support.model_types import VOCABULARY
from support.models import make_model
from support.programs import program, with_suite
from support.server import Answer, Server

# A look at each type that the installed mlx-lm has. What a type wants and this machine
# has not is stood in for: Metal's kernels, whose results have the shapes that they are
# asked for, and a package that is looked for and never used.
LOOK_AT_ALL = program("looks_at_all_models")


def test_every_type_of_this_mlx_lm() -> None:
    done = child.run(LOOK_AT_ALL, PYTHONPATH=with_suite())
    assert done.returncode == 0, done.stderr
    found, peak = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 108
    assert {"llama", "qwen3_5", "gemma4", "bitnet", "olmo"} <= set(found)
    wrong = {k: v for k, v in found.items() if v != [VOCABULARY, VOCABULARY]}
    assert not wrong
    # Graphs only: the weights of the types are of many times that size.
    assert peak < 4_000_000


def make_llama(**more: Any) -> Any:
    from support import model_types

    return model_types.make({**model_types.config_of("llama"), **more})


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_and_adapted_weights(tied: bool) -> None:
    import mlx.nn as nn
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_safe.server.mlx_lm.model_facts import look_at

    model = make_llama(tie_word_embeddings=tied)
    nn.quantize(model, group_size=32, bits=4)
    assert (look_at(model).width, look_at(model).rows) == (VOCABULARY, VOCABULARY)
    keys = {"model.embed_tokens", "self_attn.q_proj"}
    keys |= set() if tied else {"lm_head"}
    parameters = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 2, parameters)
    assert (look_at(model).width, look_at(model).rows) == (VOCABULARY, VOCABULARY)


def test_what_the_weights_are_counts_not_what_the_config_says() -> None:
    import mlx.nn as nn

    from mlx_safe.server.mlx_lm.model_facts import look_at

    model = make_llama(tie_word_embeddings=False)
    model.lm_head = nn.Linear(64, 40, bias=False)
    assert model.args.vocab_size == VOCABULARY
    facts = look_at(model)
    assert (facts.width, facts.rows, facts.writable) == (40, VOCABULARY, 40)


def test_a_model_that_cannot_be_looked_at() -> None:
    from mlx_safe.server.mlx_lm.model_facts import look_at
    from mlx_safe.server.replies import BadRequest

    model: Any = lambda tokens, cache: None  # noqa: E731
    facts = look_at(model)
    assert facts.width is None
    facts.check_bias(None)
    facts.check_bias({})
    with pytest.raises(BadRequest) as caught:
        facts.check_bias({0: 1.0})
    assert caught.value.param == "logit_bias"
    facts.check_prompt([1, 2, 3], penalties(), "prompt")


def penalties(**given: float) -> SimpleNamespace:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return SimpleNamespace(**{**dict.fromkeys(names, 0.0), **given})


def test_a_penalty_writes_where_the_prompt_says() -> None:
    from mlx_safe.server.mlx_lm.model_facts import ModelFacts
    from mlx_safe.server.replies import BadRequest

    facts = ModelFacts(width=40, rows=50)
    facts.check_prompt([49], penalties(), "prompt")
    with pytest.raises(BadRequest):
        facts.check_prompt([50], penalties(), "prompt")
    for name in vars(penalties()):
        facts.check_prompt([39], penalties(**{name: 0.5}), "prompt")
        with pytest.raises(BadRequest):
            facts.check_prompt([40], penalties(**{name: 0.5}), "prompt")


# -- what a client sees --------------------------------------------------------------

WRAPPED = "a model whose config keeps the vocabulary in text_config"


@pytest.fixture(scope="module", params=["plain", WRAPPED])
def server(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    model = tiny_model
    if request.param == WRAPPED:
        # Of the type of the README's example.
        directory = tmp_path_factory.mktemp("types")
        make_model("model_types.py", directory, str(tiny_model), "qwen3_5")
        model = directory / "qwen3_5"
    with Server(model) as running:
        yield running.wait_ready()


def width_of(server: Server) -> int:
    config = json.loads((server.model / "config.json").read_bytes())
    return int(config.get("text_config", config)["vocab_size"])


def ask(server: Server, bias: dict[str, float], way: str) -> Answer:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "logit_bias": bias,
    }
    if "sequential" in way:
        body["seed"] = 1
    return server.post({**body, "stream": "stream" in way})


WAYS = ["batched", "batched stream", "sequential", "sequential stream"]


@pytest.mark.parametrize("way", WAYS)
def test_a_bias_for_a_token_that_is_not_there(server: Server, way: str) -> None:
    """All of them are refused before anything is written."""
    width = width_of(server)
    for token in (width, -1, 10**30):
        told = ask(server, {"5": 1.0, str(token): 1.0}, way)
        assert told.status == 400, told.body
        assert told.error["param"] == "logit_bias"
        assert told.error["code"] == "invalid_request"
    assert server.process.poll() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_bias_for_the_last_token(server: Server, way: str) -> None:
    width = width_of(server)
    biased = ask(server, {"0": 0.0, str(width - 1): -5.0}, way)
    assert biased.status == 200, biased.body
    assert biased.error is None
    # It arrives: the bias for a letter makes it the answer.
    letter = ask(server, {"10": 100.0}, way)
    assert letter.text == 3 * "+"


def test_it_is_answered_while_another_answer_is_made(server: Server) -> None:
    """Not in its turn: mlx-lm looks at new requests twice a second."""
    body = {"messages": [{"role": "user", "content": "long"}], "max_tokens": 400}
    with server.connected({**body, "stream": True}) as running:
        assert running.recv(100)
        told = ask(server, {str(width_of(server)): 1.0}, "batched")
        assert told.status == 400
        assert server.metric("mlx_safe_requests_in_flight") == 1


# -- a tokenizer that has more tokens than its model -----------------------------------

ADDED = "<|added|>"


@pytest.fixture(scope="module")
def wide_tokenizer(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    from transformers import AutoTokenizer

    model = tmp_path_factory.mktemp("added")
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [ADDED]})
    tokenizer.save_pretrained(model)
    with Server(model) as running:
        yield running.wait_ready()


@pytest.mark.parametrize("seed", [{}, {"seed": 1}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_with_a_token_that_the_model_does_not_have(
    wide_tokenizer: Server, seed: dict[str, int], path: str
) -> None:
    text = f"hello {ADDED} world"
    told = wide_tokenizer.post(
        {
            "messages": [{"role": "user", "content": text}],
            "prompt": text,
            "max_tokens": 2,
            **seed,
        },
        path,
    )
    assert told.status == 400, told.body
    assert "a token that the model does not know" in told.error["message"]
    assert told.error["param"] == ("messages" if "chat" in path else "prompt")
    assert wide_tokenizer.chat().status == 200
