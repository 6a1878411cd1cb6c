"""What a request may name, and what becomes of the model that is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import child
from support.programs import program
from support.server import CONTROLLED, Answer, Server

WAYS: list[dict[str, Any]] = [
    {},
    {"seed": 1},
    {"stream": True},
    {"seed": 1, "stream": True},
]
BESIDE = {"messages": [{"role": "user", "content": "beside"}], "stream": True}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the tiny model says."""
    directory = tmp_path_factory.mktemp("adapter")
    done = child.run(program("makes_an_adapter"), tiny_model, directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def hub_cache(draft_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub with one model, ``someone/small``, and one that is none."""
    cache = tmp_path_factory.mktemp("hub")
    for name, files in (("small", draft_model), ("half", None)):
        repository = cache / f"models--someone--{name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        if files is not None:
            shutil.copytree(files, snapshot)
        else:
            snapshot.mkdir(parents=True)
            shutil.copy(draft_model / "config.json", snapshot)
    return cache


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, draft_model: Path, adapter: Path, hub_cache: Path
) -> Iterator[Server]:
    """Starts without an answer from any hub: that would be noticed by a minute."""
    env = {
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    with Server(tiny_model, program=CONTROLLED, env=env) as running:
        yield running.wait_ready()


def loads(server: Server) -> int:
    """How many models it has loaded so far."""
    return server.log.count("room for")


def assert_unknown(told: Answer, param: str) -> None:
    assert told.status == 404, told.body
    assert told.error["code"] == "model_not_found"
    assert told.error["type"] == "invalid_request_error"
    assert told.error["param"] == param
    assert "does not exist" in told.error["message"]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("model", "gpt-4o-mini"),
        ("model", "someone/nothing"),
        ("model", "someone/half"),
        ("model", "/no/such/directory"),
        ("model", "."),
        ("model", "../" * 40),
        ("draft_model", "gpt-4o-mini"),
        ("adapters", "no/such/adapter"),
    ],
)
def test_a_name_that_nobody_knows(
    server: Server, field: str, name: str, way: dict[str, Any]
) -> None:
    before = loads(server)
    told = server.chat(**{field: name}, **way)
    assert_unknown(told, field)
    assert len(told.error["message"]) < 400
    assert loads(server) == before
    assert "Traceback" not in server.log


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("field", ["model", "draft_model", "adapters"])
def test_words_that_are_no_name(
    server: Server, field: str, way: dict[str, Any]
) -> None:
    before = loads(server)
    for name in ("", "a\0b", 9000 * "x"):
        told = server.chat(**{field: name}, **way)
        assert (told.status, told.error["param"]) == (400, field)
        assert len(told.error["message"]) < 400
    assert loads(server) == before


def test_it_does_not_wait_and_disturbs_nobody(server: Server) -> None:
    """The answer comes while the step of another stands."""
    server.hold(6)  # its first token has come by then, and with it the 200
    with server.stream({**BESIDE, "max_tokens": 8}) as lines:
        server.wait_held()
        before = loads(server)
        for way in WAYS:
            assert_unknown(server.chat(model="gpt-4o-mini", **way), "model")
            assert_unknown(server.chat(adapters="no/such/adapter", **way), "adapters")
            assert_unknown(server.chat(draft_model="nosuch", **way), "draft_model")
        server.go()
        assert b"[DONE]" in b"".join(lines)
    assert loads(server) == before


def test_what_is_no_name(server: Server) -> None:
    told = server.chat(draft_model=5)
    assert (told.status, told.error["param"]) == (400, "draft_model")


def test_names_of_the_model_that_is_loaded(server: Server, tiny_model: Path) -> None:
    """None of them loads it again, and all may share a batch."""
    before = loads(server)
    crooked = tiny_model / ".." / tiny_model.name
    for name in ("default_model", str(tiny_model), f"{tiny_model}/", str(crooked)):
        answer = server.chat(model=name)
        assert answer.status == 200, answer.body
        assert answer.json["model"] == name
    assert loads(server) == before


def test_models_are_listed(server: Server, tiny_model: Path) -> None:
    listed = server.get("/v1/models").json
    ids = [model["id"] for model in listed["data"]]
    assert ids == [str(tiny_model.resolve()), "someone/small"]
    assert server.chat(model=ids[0]).status == 200


def test_a_model_of_the_hubs_cache(server: Server, draft_model: Path) -> None:
    """It is served from there, and nobody asks the hub about it."""
    cached = server.chat(model="someone/small")
    assert cached.status == 200, cached.body
    assert cached.json["model"] == "someone/small"
    assert cached.text == server.chat(model=str(draft_model)).text
    assert server.chat().status == 200


def test_an_adapter_without_a_model(server: Server, adapter: Path) -> None:
    """Both versions of mlx-lm: 0.32.2 ignored it."""
    plain = server.chat(seed=1).text
    adapted = server.chat(seed=1, adapters=str(adapter))
    assert adapted.status == 200, adapted.body
    assert adapted.text != plain
    assert server.chat(adapters=str(adapter)).text == adapted.text
    assert server.chat(seed=1).text == plain


def spoil(model: Path, directory: Path, **config: Any) -> Path:
    shutil.copytree(model, directory)
    told = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps({**told, **config}))
    return directory


@pytest.mark.parametrize(
    "fault",
    [
        *("type", "no config", "no weights", "shape", "cut", "index", "tokenizer"),
        "pipe",
    ],
)
def test_a_model_that_cannot_be_loaded(
    server: Server, tiny_model: Path, tmp_path: Path, fault: str
) -> None:
    """What is loaded stays: nothing is unloaded for what cannot take its place."""
    bad = tmp_path / "bad"
    if fault == "type":
        spoil(tiny_model, bad, model_type="nosuch")
    elif fault == "shape":
        spoil(tiny_model, bad, hidden_size=32)
    else:
        shutil.copytree(tiny_model, bad)
    weights = bad / "model.safetensors"
    if fault == "no config":
        (bad / "config.json").unlink()
    elif fault == "no weights":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif fault == "index":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "tokenizer":
        (bad / "tokenizer.json").write_text("{}")
    elif fault == "pipe":  # whose reader would wait for ever
        os.mkfifo(bad / "vocab.json")
    assert server.chat().status == 200
    before = loads(server)
    for way in WAYS:
        told = server.chat(model=str(bad), **way)
        assert told.status == 404, told.body
        assert told.error["code"] == "model_not_found"
        assert told.error["param"] == "model"
    assert server.chat().status == 200
    assert loads(server) == before


def test_an_adapter_that_does_not_fit(
    server: Server, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "bad")
    (tmp_path / "bad" / "adapters.safetensors").write_bytes(b"")
    assert server.chat().status == 200
    before = loads(server)
    told = server.chat(adapters=str(tmp_path / "bad"))
    assert (told.status, told.error["code"]) == (404, "model_not_found")
    assert server.chat().status == 200
    assert loads(server) == before


def test_a_model_that_does_not_fit_into_memory(
    tiny_model: Path, wide_model: Path
) -> None:
    with Server(tiny_model, "--max-active-memory-bytes", "2M").wait_ready() as server:
        plain = server.chat()
        assert plain.status == 200
        before = loads(server)
        told = server.chat(model=str(wide_model))
        assert (told.status, told.error["code"]) == (404, "model_not_found")
        server.wait_for_log("MLX may hold 2")
        assert server.chat().text == plain.text
        assert loads(server) == before


FAILS_LATE = program("fails_late")


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_weights_that_cannot_be_read(
    tiny_model: Path, draft_model: Path, way: dict[str, Any]
) -> None:
    """The model before is gone by then; it comes back for the next who asks."""
    with Server(tiny_model, program=FAILS_LATE).wait_ready() as server:
        plain = server.chat(**way)
        told = server.chat(model=str(draft_model), **way)
        assert (told.status, told.error["code"]) == (404, "model_not_found")
        assert server.chat(**way).text == plain.text
        assert server.chat(model=str(draft_model), **way).status == 200


# -- flags -----------------------------------------------------------------------------


def test_names_that_are_given(
    tiny_model: Path, draft_model: Path, adapter: Path
) -> None:
    names = ("--served-model-name", "main", "--served-model-name", "team/main")
    with Server(tiny_model, *names).wait_ready() as server:
        listed = [model["id"] for model in server.get("/v1/models").json["data"]]
        assert listed[:2] == ["main", "team/main"]
        assert str(tiny_model) not in server.get("/v1/models").body
        for name in ("main", "team/main", "default_model", str(tiny_model)):
            assert server.chat(model=name).status == 200
        assert server.chat(model="team/main").json["model"] == "team/main"
        assert server.chat().json["model"] == "main"
        assert server.chat(model=str(draft_model)).status == 200
        assert_unknown(server.chat(model="other"), "model")


@pytest.mark.parametrize("named", [True, False])
def test_nothing_but_the_model_that_is_served(
    tiny_model: Path, draft_model: Path, adapter: Path, named: bool
) -> None:
    flags = ["--only-served-model", *(["--served-model-name", "main"] * named)]
    with Server(tiny_model, *flags).wait_ready() as server:
        listed = [model["id"] for model in server.get("/v1/models").json["data"]]
        assert listed == (["main"] if named else [str(tiny_model.resolve())])
        for name in (listed[0], "default_model"):
            assert server.chat(model=name).status == 200
        assert server.chat().status == 200
        assert (server.chat(model=str(tiny_model)).status == 404) == named
        assert_unknown(server.chat(model=str(draft_model)), "model")
        assert_unknown(server.chat(adapters=str(adapter)), "adapters")
        assert_unknown(server.chat(draft_model=str(draft_model)), "draft_model")


def test_a_start_without_a_model(tiny_model: Path) -> None:
    program = """
import sys
from mlx_safe.cli import main
at = sys.argv.index("--model")
del sys.argv[at : at + 2]
sys.exit(main(["serve", *sys.argv[1:]]))
"""
    with Server(tiny_model, program=program).wait_ready() as server:
        told = server.chat()
        assert (told.status, told.error["param"]) == (404, "model")
        assert "must name a model" in told.error["message"]
        assert str(tiny_model) not in server.get("/v1/models").body
        assert server.chat(model=str(tiny_model)).status == 200
        assert "; no --model, so requests must name one" in server.log
        assert "loading the model" not in server.log


def test_the_adapter_of_the_command_line(tiny_model: Path, adapter: Path) -> None:
    """mlx-lm 0.31.3 does not load it."""
    with Server(tiny_model).wait_ready() as server:
        asked = server.chat(adapters=str(adapter)).text
        plain = server.chat().text
    with Server(tiny_model, "--adapter-path", str(adapter)).wait_ready() as server:
        for name in ({}, {"model": str(tiny_model)}, {"adapters": str(adapter)}):
            assert server.chat(**name).text == asked != plain
