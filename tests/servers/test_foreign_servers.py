"""Servers of others under the same faults: alone, under ``mlx-safe run``, with replay.

What each client saw goes into ``build/servers/matrix.json`` as well; ``python
tests/servers/matrix.py`` makes the table of docs/integrations.md of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peers import (
    ANSWER_S,
    MODES,
    PEERS,
    ROOT,
    START_S,
    TAKES_A_DESCRIPTOR,
    Peer,
    Running,
    outcome,
    running,
)

from support.server import Answer

OUT = ROOT / "build" / "servers"
METALSIM = ROOT / "build" / "native" / "metalsim" / "libmetalsim.so"
REQUIRED = os.environ.get("MLX_SAFE_REQUIRE_SERVERS") == "1"


def fault(step: str, lasting: str = "once") -> str:
    """As on a Mac: the hooks count it, and MLX raises it."""
    return ",".join(f"{step}:8:{lasting}:{action}" for action in ("record", "raise"))


# Case: the plan, whether it is streamed.
SINGLE = {
    "prefill": (fault("prefill:1"), False),
    "decode": (fault("decode:5"), False),
    "prefill, stream": (fault("prefill:1"), True),
    "decode, stream": (fault("decode:5"), True),
}
THREE = [f"three at once, {word}" for word in ("one", "two", "three")]
TEXTS = [*SINGLE, *THREE, "lasting"]
AFTER = "after a fault"
FATAL = "it ends"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = os.environ.get("MLX_SAFE_TEST_PEERS", "").split(",")
    modes = os.environ.get("MLX_SAFE_TEST_MODES", ",".join(MODES)).split(",")
    peers = [p for p in PEERS if p.name in asked or asked == [""]]
    cases = [(p, m) for p in peers for m in modes if m != "replay" or p.batched]
    metafunc.parametrize("case", cases, ids=[f"{p.name}-{m}" for p, m in cases])


@pytest.fixture(scope="session")
def model(make_once: Any) -> Path:
    return Path(make_once("tiny-qwen3", "../servers/tiny_qwen3.py"))


@pytest.fixture(scope="session")
def references() -> dict[str, dict[str, str]]:
    """By server: what it says to each text when nothing fails."""
    return {}


def rights_of(server: Running) -> dict[str, str]:
    """Some servers end a text in another way when it is streamed."""
    found = {}
    for text in [*TEXTS, AFTER]:
        answer = server.say(text, text.endswith("stream") or text in THREE)
        assert answer.status == 200, (answer, server.log)
        found[text] = answer.text
    return found


@pytest.fixture
def reference(
    case: tuple[Peer, str],
    references: dict[str, dict[str, str]],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Of a process of its own: some servers remember whole answers."""
    peer, _ = case
    if not peer.is_installed:
        why = f"{peer.name} is not installed: make test-servers"
        if REQUIRED:
            pytest.fail(why)
        pytest.skip(why)
    if peer.name not in references:
        work = tmp_path_factory.mktemp("reference")
        with running(peer, "alone", model, work) as server:
            references[peer.name] = rights_of(server)
    return references[peer.name]


@pytest.fixture
def cells(case: tuple[Peer, str]) -> Iterator[dict[str, str]]:
    peer, mode = case
    found: dict[str, str] = {}
    yield found
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"{peer.name}.{mode}.json"
    file.write_text(json.dumps({"versions": peer.versions, "cells": found}, indent=1))


def test_faults(
    case: tuple[Peer, str],
    reference: dict[str, str],
    cells: dict[str, str],
    model: Path,
    tmp_path: Path,
) -> None:
    peer, mode = case
    with running(peer, mode, model, tmp_path / "work") as server:
        ask_singly(server, cells, reference)
        ask_three(server, cells, reference)
        ask_in_vain(server, cells, reference)
        end(server, cells)
    if mode in ("asgi", "replay"):  # fusion-mlx has such, alone
        wrong = [c for c in cells.values() if c.startswith("wrong")]
        assert not wrong, (cells, server.log)
    assert cells["next"] == "right", (cells, server.log)
    if mode == "replay" and peer.name.startswith("vllm"):
        assert {cells[case] for case in SINGLE} == {"right"}, (cells, server.log)
        assert cells["three at once"] == "3 of 3 right", (cells, server.log)
    if mode in ("asgi", "replay"):
        plain = "cut" if peer.begins_early else "503 + Retry-After"
        assert cells["lasting"] == plain, (cells, server.log)
        assert cells[FATAL] == f"{plain}, event + [DONE]", (cells, server.log)
        status = "it goes on" if peer.in_child else "75"
        assert cells["status"] == status, (cells, server.log)


def ask_singly(
    server: Running, cells: dict[str, str], reference: dict[str, str]
) -> None:
    for case, (plan, stream) in SINGLE.items():
        server.plan_faults(plan)
        cells[case] = outcome(server.say(case, stream), reference[case])
    server.plan_faults("")


def ask_three(
    server: Running, cells: dict[str, str], reference: dict[str, str]
) -> None:
    server.plan_faults(fault("decode:8"))
    answers = server.say_all(THREE)
    seen = [outcome(a, reference[t]) for a, t in zip(answers, THREE, strict=True)]
    right = sum(s == "right" for s in seen)
    wrong = [s for s in seen if s.startswith("wrong")]
    rest = sorted({s for s in seen if s != "right"})
    cells["three at once"] = f"{right} of 3 right" + (
        f"; {', '.join(rest)}" if rest else ""
    )
    if wrong:
        cells["three at once"] = f"wrong: {cells['three at once']}"


def ask_in_vain(
    server: Running, cells: dict[str, str], reference: dict[str, str]
) -> None:
    server.plan_faults(fault("decode:2", "persistent"))
    cells["lasting"] = outcome(server.say("lasting"), reference["lasting"])
    server.plan_faults("")
    cells["next"] = outcome(server.say(AFTER), reference[AFTER])


def end(server: Running, cells: dict[str, str]) -> None:
    """An exception that nothing catches on a thread of MLX's, with two that wait."""
    server.plan_faults("decode:40:8:once:terminate")
    answers: dict[bool, tuple[Answer, float]] = {}

    def ask(stream: bool) -> None:
        answers[stream] = server.say(f"{FATAL} {stream}", stream, 400), time.time()

    threads = [threading.Thread(target=ask, args=(s,)) for s in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * ANSWER_S)
    cells[FATAL] = ", ".join(outcome(answers[s][0], None) for s in (False, True))
    try:
        status = server.process.wait(30)
        cells["status"] = signal.Signals(-status).name if status < 0 else str(status)
    except subprocess.TimeoutExpired:
        cells["status"] = "it goes on"
    fired = server.last_fired()
    if fired is not None:
        last = max(when for _, when in answers.values())
        cells["seconds to the last answer"] = f"{last - fired:.2f}"


def test_one_socket_over_a_restart(
    case: tuple[Peer, str], reference: dict[str, str], model: Path, tmp_path: Path
) -> None:
    """Nobody is refused, and the next program answers as the first one did."""
    peer, mode = case
    command = TAKES_A_DESCRIPTOR.get(peer.name)
    if command is None or mode != "replay":
        pytest.skip("it takes no descriptor, or is run so once only")
    peer = replace(peer, command=command)
    with running(peer, "listen", model, tmp_path / "work") as server:
        server.plan_faults("decode:5:8:once:terminate")
        assert outcome(server.say("decode"), None) == "503 + Retry-After", server.log
        # It would strike in the next program as well.
        server.plan_faults_of_the_next("")
        deadline = time.monotonic() + START_S
        while (after := server.say(AFTER)).status != 200:
            # Cut, if the one that ends has accepted it; never refused.
            assert "refused" not in (after.broken or ""), server.log
            assert time.monotonic() < deadline, (after, server.log)
            time.sleep(0.05)
        assert outcome(after, reference[AFTER]) == "right", server.log
        assert "ended with status 75; starting it again" in server.log


# What a client sees, and whether the server goes on. On MLX 0.31.2 a failed command
# buffer ends a process without hooks.
ON_METAL = {
    "alone": ("no answer", False),
    "run": ("500", True),
    "asgi": ("503 + Retry-After", True),
    "replay": ("right", True),
}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_command_buffer_of_the_simulated_metal(
    case: tuple[Peer, str],
    reference: dict[str, str],
    model: Path,
    tmp_path: Path,
    stream: bool,
) -> None:
    """Through the hooks, as on a Mac."""
    peer, mode = case
    if peer.mlx != "0.31":
        pytest.skip("MLX 0.32 ends no process")
    if not METALSIM.exists():
        pytest.fail(f"{METALSIM} is not there: make build/native.stamp")
    peer = replace(peer, env={**peer.env, "MLX_SAFE_METAL_RUNTIME": str(METALSIM)})
    text = "decode, stream" if stream else "decode"
    seen, lives = ON_METAL[mode]
    if stream and seen != "right":
        seen = "event + [DONE]" if lives else "cut"
    with running(peer, mode, model, tmp_path / "work") as server:
        server.plan_faults("decode:5:8:once:metal")
        assert outcome(server.say(text, stream), reference[text]) == seen, server.log
        if lives:
            server.plan_faults("")
            after = server.say(AFTER)
            assert outcome(after, reference[AFTER]) == "right", server.log
        else:
            assert server.process.wait(30) == -signal.SIGABRT
