"""CUDA's failures in the server, by the texts that MLX has for them: no card needed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import CONTROLLED, NEVER, Answer, Server, eventually

SOURCES = Path(__file__).resolve().parent.parent / "src" / "mlx_safe"
PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
ADDRESS, ECC, ASSERT, MISALIGNED, LAUNCH = 700, 214, 710, 716, 719
NO_END = {"0": -100.0, "2": -100.0}


def ask_all(
    server: Server,
    clients: int,
    text: str = "of a ship",
    meanwhile: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[Answer]:
    """So many clients at once, every other one with a stream."""
    answers: list[Answer] = []

    def ask(number: int) -> None:
        said = f"{number}: {text}"
        stream = number % 2 == 1
        answers.append(server.chat(said, stream=stream, logit_bias=NO_END, **options))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("code", [ADDRESS, ECC, ASSERT, MISALIGNED, LAUNCH])
def test_a_sticky_error_ends_the_process_and_tells_everyone(
    tiny_model: Path, path: str, code: int
) -> None:
    with Server(tiny_model, program=CONTROLLED).wait_ready() as server:

        def fail() -> None:
            """When all are there: who comes later is told something else."""
            server.wait_held()
            server.wait_for_clients(4)
            server.plan(f"decode:1:{code}:persistent:cuda")
            server.go()

        server.hold(12)
        answers = ask_all(server, 4, meanwhile=fail, max_tokens=64, **PATHS[path])
        assert server.wait() == 75
        struck = [a for a in answers if a.error["code"] == "cuda_device_lost"]
        assert struck and all(a.error["retry_after"] == 5 for a in struck)
        for answer in answers:
            assert answer.broken is None
            # A client that comes when the step has failed is only refused.
            assert answer in struck or answer.error["code"] == "unavailable"
            assert answer.done if answer.events else answer.status == 503
        # One that lasts is not waited for, and nothing about it is a surprise.
        assert "Traceback" not in server.log
        assert "still pending" not in server.log
        assert server.log.count("the process must be replaced") == 1


LOST_LATER = program("loses_the_card_in_a_reset") + CONTROLLED


def test_a_sticky_error_that_a_recovery_meets_is_one(tiny_model: Path) -> None:
    plan = "decode:4:2:once:cuda"
    with Server(tiny_model, inject=plan, program=LOST_LATER).wait_ready() as server:
        (answer,) = ask_all(server, 1, max_tokens=64)
        assert answer.error["code"] == "cuda_device_lost"
        assert server.wait() == 75
        assert "Traceback" not in server.log
        assert "still pending" not in server.log


def test_out_of_memory_is_run_again_with_less(tiny_model: Path) -> None:
    with Server(tiny_model, inject=f"any:{NEVER}", program=CONTROLLED) as server:
        server.wait_ready()
        whole = {
            path: [a.text for a in ask_all(server, 1, max_tokens=12, **options)]
            for path, options in PATHS.items()
        }
        for path, options in PATHS.items():
            server.plan("decode:4:2:once:cuda")
            answers = ask_all(server, 1, max_tokens=12, **options)
            assert [a.text for a in answers] == whole[path]
        server.plan("decode:1:2:persistent:cuda")
        (answer,) = ask_all(server, 1, max_tokens=12)
        assert answer.status == 503
        assert answer.error["code"] == "cuda_out_of_memory"
        assert answer.error["type"] == "resource_exhausted_error"
        server.plan("")
        assert server.chat("again", max_tokens=4).status == 200
        assert "Traceback" not in server.log


# Where memory runs out is said in a request's stop words, which mlx-lm takes as text.
WHERE = program("fails_where_asked")


@pytest.fixture(scope="module")
def failing(tiny_model: Path) -> Any:
    with Server(tiny_model, program=WHERE).wait_ready() as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["python", "malloc", "cuda"])
@pytest.mark.parametrize("where", ["tokenize", "sampler", "fetch", "insert"])
def test_out_of_memory_anywhere_is_run_again(
    failing: Server, where: str, kind: str, path: str
) -> None:
    def chat(*stop: str) -> Answer:
        return failing.chat(
            "of a ship", max_tokens=6, logit_bias=NO_END, stop=[*stop], **PATHS[path]
        )

    resets = failing.metric("mlx_safe_resets_total")
    answer = chat(f"FAIL {where} {kind}")
    assert answer.status == 200, answer.body
    assert answer.text == chat("no such word").text
    # That of an entry comes when the client has its answer.
    assert eventually(lambda: failing.metric("mlx_safe_resets_total") > resets)
    assert "Traceback" not in failing.log


def test_a_card_that_is_smaller_than_estimated_ends_nobody(tiny_model: Path) -> None:
    """Steps take fifteen times what they are thought to: what fails teaches enough."""
    env = {"CARD": str(10**8), "HIDDEN": "14"}
    with Server(tiny_model, program=program("small_card"), env=env) as server:
        server.wait_ready()
        # Of other programs nothing is left: what there is, the driver says.
        server.wait_for_log("what is free on the card now")
        answers = ask_all(server, 8, max_tokens=16, text="of a ship " * 100)
        assert [answer.status for answer in answers] == [200] * 8, server.log
        wrong = [answer for answer in answers if answer.broken or answer.error]
        assert not wrong, server.log
        # Each teaches: there are fewer than requests.
        faults = server.metric("mlx_safe_generation_failures_total")
        assert 1 <= faults < 8, server.log
        server.wait_for_log("out of memory with up to")
        why = ("it stays there for", "other programs have taken the rest of the card")
        assert any(text in server.log for text in why)


def test_a_ballast_that_comes_is_made_room_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    ballast = tmp_path / "ballast"
    env = {"CARD": str(10**8), "BALLAST": str(ballast)}
    with Server(tiny_model, program=program("small_card"), env=env) as server:
        server.wait_ready()
        (before,) = ask_all(server, 1, max_tokens=8, text="of a ship " * 100)
        ballast.write_text(str(9 * 10**7))
        answers = ask_all(server, 4, max_tokens=8, text="of a ship " * 100)
        assert [answer.status for answer in answers] == [200] * 4
        told = re.search(
            r"^mlx_safe_memory_ceiling_bytes (\S+)", server.get("/metrics").body, re.M
        )
        assert told and float(told[1]) <= 10**7
        ballast.unlink()
        (after,) = ask_all(server, 1, max_tokens=8, text="of a ship " * 100)
        assert after.text == before.text


# Of at most twenty numbers, of one token's log-probability, and of three.
READ_ON_THE_HOST = {
    "asgi/lost.py": 1,
    "server/logprobs.py": 2,
    "server/not_numbers.py": 1,
    "server/ranks.py": 1,
}


def test_no_large_array_is_read_on_the_host() -> None:
    """On a card it would be there twice (2 GiB took 4, MLX 0.32.4 with CUDA)."""
    found: dict[str, int] = {}
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        assert "import numpy" not in text and "from numpy" not in text, path
        count = len(
            re.findall(r"[\w\])]\.(?:tolist|item)\(\)|memoryview\(mx|mx\.save", text)
        )
        if count:
            found[path.relative_to(SOURCES).as_posix()] = count
    assert found == READ_ON_THE_HOST
