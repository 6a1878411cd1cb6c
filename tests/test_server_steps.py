"""Steps of a prompt are sized by time, and what waits meanwhile is seen."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_safe.server.prefill import PROBE, PrefillStep
from support.programs import program
from support.server import CONTROLLED, NEVER, PYTHON, Answer, Server, eventually

# 2 ms a token: at most 500 tokens in a second. A word has four tokens.
SLOW = program("slow_to_read")
FLAGS = (
    *("--step-seconds", "1", "--prefill-step-size", "1024"),
    *("--prompt-cache-size", "0"),
)


# What ends mlx-lm's turn of its batch after half a second never does.
ENDLESS_TURNS = (
    """
import mlx_lm.server
mlx_lm.server.TimeBudget.__init__.__defaults__ = (3600.0, 25, 10)
"""
    + CONTROLLED
)
QUEUED = 'mlx_safe_requests_in_state{state="queued"}'


@pytest.fixture(scope="module")
def slow(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, *FLAGS, program=SLOW, inject=f"any:{NEVER}") as server:
        yield server.wait_ready()


def steps(server: Server, since: int) -> list[int]:
    return [int(n) for n in re.findall(r"step of (\d+)", server.log[since:])]


def prompt(words: int) -> str:
    return " ".join(f"w{i % 97}" for i in range(words))


@pytest.mark.parametrize("path", ["sequential", "batched"])
def test_no_step_is_longer_once_the_speed_is_known(slow: Server, path: str) -> None:
    """The first that is known of the model is the only one that may be longer."""
    more = {"seed": 1} if path == "sequential" else {}
    since = len(slow.log)
    answer = slow.chat(prompt(400), max_tokens=2, **more)
    assert answer.status == 200, slow.log
    found = steps(slow, since)
    long = [n for n in found if n > 500]
    assert len(long) <= (path == "sequential"), found
    # Nothing but the first step is read twice.
    read = answer.json["usage"]["prompt_tokens"]
    assert read - 8 <= sum(found) - sum(long) <= read + 8


def test_requests_together_share_the_time(slow: Server) -> None:
    assert slow.chat(prompt(100), max_tokens=1).status == 200  # the speed is known
    since = len(slow.log)
    answers = slow.chats(4, text=prompt(150), max_tokens=2)
    assert [a.status for a in answers] == [200] * 4
    assert max(steps(slow, since)) <= 500


def test_short_prompts_are_not_padded_to_a_long_one(tiny_model: Path) -> None:
    """They are read together, and the model computes no more than was asked."""
    found: list[Answer] = []

    def ask(words: int, seed: int | None) -> None:
        found.append(server.chat(prompt(words), max_tokens=1, seed=seed))

    # While the first, which runs alone, is read, four come that join one batch.
    asked = [
        threading.Thread(target=ask, args=(words, seed), daemon=True)
        for words, seed in ((200, 1), (100, None), (10, None), (11, None), (12, None))
    ]
    flags = ("--step-seconds", "0", "--prompt-cache-size", "0")
    with Server(tiny_model, *flags, program=SLOW, inject=f"any:{NEVER}") as server:
        server.wait_ready()
        since = len(server.log)
        asked[0].start()
        server.wait_for_requests(1)
        for thread in asked[1:]:
            thread.start()
        assert eventually(lambda: server.metric(QUEUED) == 4), server.log
        for thread in asked:
            thread.join(60)
        assert [answer.status for answer in found] == [200] * 5, server.log
        read = sum(answer.json["usage"]["prompt_tokens"] for answer in found)
        computed = steps(server, since)
    assert sum(computed) < 4 / 3 * read, computed


@pytest.mark.parametrize("seed", [None, 1])
def test_a_cancel_takes_a_step(slow: Server, seed: int | None) -> None:
    assert slow.chat(prompt(100), max_tokens=1).status == 200
    seen = slow.disconnects
    body = {
        "messages": [{"role": "user", "content": prompt(2000)}],
        "max_tokens": 1,
        "seed": seed,
    }
    with slow.connected(body):
        slow.wait_for_requests(1)
        time.sleep(1.0)
    since = len(slow.log)
    slow.wait_for_log("outcome=client_left", seen + 1)
    assert slow.chat("short", max_tokens=1).status == 200
    assert sum(steps(slow, since)) < 2000  # of 8000


def test_who_waits_is_told(slow: Server) -> None:
    def long() -> None:
        assert slow.chat(prompt(500), max_tokens=1, seed=1).status == 200

    thread = threading.Thread(target=long)
    thread.start()
    slow.wait_for_requests(1)
    other = threading.Thread(target=lambda: slow.chat("short", max_tokens=1))
    other.start()
    assert eventually(lambda: slow.get("/health").json["waiting"] == 1)
    health = slow.get("/health").json
    assert health["in_flight"] == 2 and health["step"]["kind"] == "prefill"
    thread.join(60)
    other.join(60)
    assert eventually(lambda: slow.get("/health").json["in_flight"] == 0)


def test_the_watchdog_counts_progress_in_a_prompt(tiny_model: Path) -> None:
    """Reading takes twice as long as a step may hang."""
    flags = ("--stall-timeout", "3", *FLAGS)
    with Server(tiny_model, *flags, program=SLOW, inject=f"any:{NEVER}") as server:
        server.wait_ready()
        answer = server.chat(prompt(800), max_tokens=1)
        assert answer.status == 200, server.log
        assert server.process.poll() is None


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[Server]:
    """mlx-lm tells nothing of a prompt that is read with a draft model."""
    flags = (*FLAGS, "--draft-model", str(tiny_model), "--stall-timeout", "3")
    more = ("--keepalive-after", "0")
    with Server(
        tiny_model, *flags, *more, program=SLOW, inject=f"any:{NEVER}"
    ) as server:
        yield server.wait_ready()


def test_a_draft_model_changes_nothing_of_it(drafting: Server) -> None:
    """Twice as long as a step may hang: the process was replaced."""
    since = len(drafting.log)
    answer = drafting.chat(prompt(800), max_tokens=4, stream=True)
    assert answer.status == 200 and answer.done, drafting.log
    assert drafting.process.poll() is None
    found = steps(drafting, since)
    # The first that is known of the model. Where a busy machine makes the draft model
    # slow, its step is the one that tells, and 512 tokens of the target take 1.02 s.
    long = [n for n in found if n > 512]
    assert len(long) <= 1, found
    read = re.findall(r"^: keepalive (\d+)/(\d+)$", answer.body, re.MULTILINE)
    done = [int(n) for n, _ in read]
    assert len(done) > 6
    # Up to its end, and perhaps begun again after the step that was too long.
    assert done[-1] == int(read[-1][1])
    assert sum(a > b for a, b in itertools.pairwise(done)) <= 1


def test_a_cancel_takes_a_step_with_a_draft_model(drafting: Server) -> None:
    assert drafting.chat(prompt(100), max_tokens=1).status == 200
    seen = drafting.disconnects
    message = {"role": "user", "content": prompt(2000)}
    with drafting.connected({"messages": [message], "max_tokens": 1}):
        drafting.wait_for_requests(1)
        time.sleep(1.0)
        step = drafting.get("/health").json["step"]
        assert step["kind"] == "prefill" and step["age_s"] < 5
        (shown,) = drafting.get("/status.json").json["requests"]["list"]
        assert 0 < shown["read_tokens"] < shown["to_read"]
    since = len(drafting.log)
    drafting.wait_for_log("outcome=client_left", seen + 1)
    assert drafting.chat("short", max_tokens=1).status == 200
    assert sum(steps(drafting, since)) < 2000  # of 8000


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_comes_in_joins_the_batch_at_the_next_step(
    tiny_model: Path, stream: bool
) -> None:
    """mlx-lm lets it wait until the batch has run for half a second."""
    server = Server(tiny_model, program=ENDLESS_TURNS).wait_ready()
    with server, contextlib.ExitStack() as stack:
        server.hold(6)
        asked = stack.enter_context(server.chatting(1, max_tokens=400))
        stack.callback(server.go)
        server.wait_held()
        newcomers = [
            threading.Thread(
                target=lambda i=i: found.append(
                    server.chat(f"newcomer {i}", max_tokens=3, stream=stream)
                ),
                daemon=True,
            )
            for i in range(3)
        ]
        found: list[Answer] = []
        for thread in newcomers:
            thread.start()
        assert eventually(lambda: server.metric(QUEUED) == 3), server.log
        # They have their answers before the first one has taken so many steps.
        server.hold(60)
        server.go()
        server.wait_held()
        for thread in newcomers:
            thread.join(20)
        assert [a.status for a in found] == [200] * 3, server.log
        assert not asked


def test_steps_that_are_short_anyway_are_as_asked_for() -> None:
    settings = cast(Any, SimpleNamespace(prefill_step_size=256))
    assert PrefillStep(settings, aim_s=5.0).fit(probe=PROBE) == 256


def test_the_first_step_of_a_model_is_short() -> None:
    """Of 256 tokens it took 55 s on a machine with other load, and nothing told."""
    settings = cast(Any, SimpleNamespace(prefill_step_size=2048))
    prefill = PrefillStep(settings, aim_s=5.0)
    assert prefill.fit(probe=PROBE) == 32
    prefill.took(32, 6.4)
    assert prefill.fit(probe=PROBE) == 16
    prefill.model_loaded()  # one that is quick, or of which a step itself takes time
    for seconds, size in ((0.01, 2048), (0.3, 512)):
        assert prefill.fit(probe=PROBE) == 32
        prefill.took(32, seconds)
        assert prefill.fit(probe=PROBE) == size
        prefill.took(size, size / 1000)
        assert prefill.fit(probe=PROBE) == 2048
        prefill.took(20, 0.3)  # the rest of a prompt tells nothing
        assert prefill.fit(probe=PROBE) == 2048
        prefill.model_loaded()


def test_the_last_try_stays_below_a_narrow_step(tiny_model: Path) -> None:
    """It was thought to have read 10,240 tokens, and the last try went up to 2048."""
    done = subprocess.run(
        [PYTHON, "-c", program("lacks_memory_in_a_narrow_step"), str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, most = map(int, done.stdout.split())
    assert 400 < read < 600 and most <= read // 4
