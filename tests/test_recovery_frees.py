"""What a failure held is free at once, because it is owned: no collector finds it.

The server runs with Python's collector turned off, and its ``gc.collect`` does
nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import CONTROLLED, NEVER, Server, eventually

PROGRAM = program("frees_without_the_collector") + CONTROLLED

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
# What mlx-lm has objects of its own for, and closures.
MORE = {
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "logprobs": True,
    "top_logprobs": 3,
    "stop": ["a word that never comes"],
}
PLANS = [
    "decode:6:8",
    "decode:3:8",  # a log-probability is about to be looked at
    "prefill:1:8",
    "prefill:2:8",
    "decode:6:2",
    "decode:6:8:once:record",
    "decode:6:8:once:bug",
]
# The prompt's keys and values take 300 KB; what MLX keeps of a step, far less.
SLACK = 32 * 2**10


@pytest.fixture(scope="module", params=["alone", "drafted"])
def server(
    request: pytest.FixtureRequest, wide_model: Path, draft_model: Path
) -> Iterator[Server]:
    arguments = ["--prompt-cache-size", "0", "--replay-attempts", "0"]
    # Two steps for each prompt.
    arguments += ["--prefill-step-size", "256"]
    if request.param == "drafted":
        arguments += ["--draft-model", str(draft_model)]
    with Server(
        wide_model, *arguments, program=PROGRAM, inject=f"any:{NEVER}"
    ) as server:
        server.wait_ready()
        yield server


def chat(server: Server, number: int, **options: Any) -> Any:
    return server.chat(
        f"{number} " + "ship " * 60,
        max_tokens=20,
        logit_bias={"0": -100, "2": -100},
        **options,
    )


def resets(server: Server) -> list[int]:
    return [int(n) for n in re.findall(r"after the reset: (\d+)", server.log)]


def fail_three(server: Server, path: str, plan: str) -> tuple[set[int], int, int]:
    """The answers' status, and the bytes before the failure and after the reset."""
    assert chat(server, 1, **PATHS[path]).status == 200
    before = server.ask("memory")
    seen = len(resets(server))
    server.plan(plan)
    answers: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda i: answers.append(chat(server, i, **PATHS[path], **MORE)),
            args=(i,),
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The log may be read later than the answers.
    assert eventually(lambda: len(resets(server)) > seen), server.log
    return {a.status for a in answers}, before, max(resets(server)[seen:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("plan", PLANS)
def test_arrays_of_a_failed_step_are_free_without_a_collector(
    server: Server, path: str, plan: str
) -> None:
    # Another thread that does not come to run may hold an array for a moment, on a
    # machine that is busy; what nothing frees is there each time.
    seen = []
    for _ in range(3):
        status, before, after = fail_three(server, path, plan)
        seen.append((status, before, after))
        if status & {500, 503} and after < before + SLACK:
            return
    pytest.fail(f"status, bytes before, bytes after the reset: {seen}\n{server.log}")
