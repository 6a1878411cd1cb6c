"""Conversations on disk: exact after the end of the process, and after any fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.kv.command import kv
from support.models import make_model
from support.server import CONTROLLED, Server, eventually, kept_in

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
# A token for each byte: eleven steps. What reading costs grows with the square.
WORDS = " ".join(f"{n} ships" for n in range(150))
STEP = ("--prefill-step-size", "128")


def ask(server: Server, *turns: str, **more: Any) -> tuple[str, int]:
    """The answer's text, and how many tokens of the prompt were not read."""
    roles = ["user", "assistant"] * len(turns)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, turns, strict=False)
    ]
    answer = server.chat(
        messages=messages, max_tokens=12, temperature=0.0, timeout=600, **more
    )
    assert answer.status == 200, answer
    details = answer.json["usage"].get("prompt_tokens_details") or {}
    return answer.text, details.get("cached_tokens", 0)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Server]:
    """One without a tier, whose prompt cache is emptied before each question."""
    with Server(tiny_model, *STEP, program=CONTROLLED) as server:
        yield server.wait_ready()


def with_tier(model: Path, directory: Path, *more: str) -> Server:
    arguments = (*kept_in(directory), *STEP, *more)
    # No snapshot waits for the next one, and each pays: what is to be there is.
    env = {"KV_WAIT_S": "0", "KV_PAYS": "1"}
    return Server(model, *arguments, program=CONTROLLED, env=env)


def forget(server: Server) -> None:
    """Memory has no prompt any more, the last one's either.

    mlx-lm keeps that a moment after its client has the answer.
    """
    assert eventually(lambda: server.ask("forget") > 0)


def wait_written(server: Server, at_least: int = 1) -> None:
    assert eventually(
        lambda: (
            server.metric("mlx_safe_kv_disk_waiting_bytes") == 0
            and server.metric("mlx_safe_kv_disk_files") >= at_least
        )
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_next_turn_after_a_kill_is_exact_and_not_read(
    plain: Server, tiny_model: Path, tmp_path: Path, path: str
) -> None:
    plain.ask("forget")
    first, _ = ask(plain, WORDS, **PATHS[path])
    plain.ask("forget")
    second, _ = ask(plain, WORDS, first, "And now?", **PATHS[path])
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        assert ask(server, WORDS, **PATHS[path])[0] == first
        wait_written(server, 2)
        assert str(tmp_path / "kv") in server.log
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        text, cached = ask(server, WORDS, first, "And now?", **PATHS[path])
        assert text == second
        assert cached >= 512
        assert server.metric("mlx_safe_kv_disk_restored_total") == 1
        assert not list((tmp_path / "kv" / "marks").iterdir())


@pytest.mark.parametrize("path", PATHS)
def test_a_fault_in_the_midst_of_a_prompt_loses_a_block_and_a_step_at_most(
    plain: Server, tiny_model: Path, tmp_path: Path, path: str
) -> None:
    plain.ask("forget")
    expected, _ = ask(plain, WORDS, **PATHS[path])
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        server.plan("prefill:6:8")
        text, _ = ask(server, WORDS, **PATHS[path])
        assert text == expected
        assert server.metric("mlx_safe_replays_total") == 1
        assert server.metric("mlx_safe_kv_disk_restored_tokens_total") >= 256


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", ["killed", "left"])
def test_a_long_prompt_that_is_broken_off_is_not_lost(
    plain: Server, tiny_model: Path, tmp_path: Path, path: str, way: str
) -> None:
    """The process is killed in the midst of it, or the client leaves."""
    plain.ask("forget")
    expected, _ = ask(plain, WORDS, **PATHS[path])
    body = {"messages": [{"role": "user", "content": WORDS}], **PATHS[path]}
    read = 9 * 128  # when the tenth step waits
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        server.hold(10)
        with server.connected(body):
            server.wait_held()
            wait_written(server, (read - 128) // 256)
            if way == "killed":
                os.kill(server.process.pid, signal.SIGKILL)
                server.wait()
        if way == "left":
            server.tell("go")
            assert_broken_off(server, expected, read, path)
    if way == "killed":
        with with_tier(tiny_model, tmp_path / "kv") as server:
            assert_broken_off(server.wait_ready(), expected, read, path)


def assert_broken_off(server: Server, expected: str, read: int, path: str) -> None:
    text, cached = ask(server, WORDS, **PATHS[path])
    assert text == expected
    assert cached >= read - 256 - 128


KINDS = ["gemma3_text", "qwen3_next", "falcon_h1"]


@pytest.fixture(scope="module")
def types(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each of these types: windows, states, lists."""
    directory = tmp_path_factory.mktemp("types")
    return make_model("model_types.py", directory, str(tiny_model), *KINDS)


SHORT = WORDS[:560]
# So that these models are read far slower than they are loaded, on any machine.
SMALL_STEP = 4


@pytest.fixture(scope="module", params=KINDS)
def kept(
    request: pytest.FixtureRequest, types: Path, tmp_path_factory: Any
) -> Iterator[tuple[Server, Path]]:
    """A server of a model with windows or states, and its directory."""
    directory = tmp_path_factory.mktemp("kept") / "kv"
    step = ("--prefill-step-size", str(SMALL_STEP))
    with with_tier(types / request.param, directory, *step) as server:
        yield server.wait_ready(), directory


@pytest.mark.parametrize("path", PATHS)
def test_windows_and_states_are_used_and_not_read_again(
    kept: tuple[Server, Path], path: str
) -> None:
    server, directory = kept
    text, how = SHORT + path, PATHS[path]
    first, _ = ask(server, text, **how)
    wait_written(server)
    # As memory has it, from disk alone, and read anew.
    second, _ = ask(server, text, first, "And now?", **how)
    forget(server)
    restored, cached = ask(server, text, first, "And now?", **how)
    assert (restored, cached >= 512) == (second, True)
    # A client that edits its last turn begins from the boundary before it.
    forget(server)
    _, cached = ask(server, text, first + "!", "And now?", **how)
    assert cached >= 512
    forget_all(server, directory)
    assert ask(server, text, first, "And now?", **how) == (second, 0)


@pytest.mark.parametrize("path", PATHS)
def test_of_windows_and_states_a_fault_loses_a_block_and_a_step_at_most(
    kept: tuple[Server, Path], path: str
) -> None:
    server, directory = kept
    text, how = "in the midst " + SHORT + path, PATHS[path]
    server.ask("forget")
    before = server.metric("mlx_safe_kv_disk_restored_tokens_total")
    steps = len(SHORT) // SMALL_STEP
    server.plan(f"prefill:{steps + 1}:8")
    found, _ = ask(server, text, **how)
    assert server.metric("mlx_safe_replays_total") >= 1
    after = server.metric("mlx_safe_kv_disk_restored_tokens_total")
    assert after - before >= (steps - 1) * SMALL_STEP - 256
    forget_all(server, directory)
    assert ask(server, text, **how) == (found, 0)


def test_a_hybrids_next_turn_after_a_kill(types: Path, tmp_path: Path) -> None:
    model, directory = types / "qwen3_next", tmp_path / "kv"
    with with_tier(model, directory) as server:
        first, _ = ask(server.wait_ready(), SHORT)
        wait_written(server)
        second, _ = ask(server, SHORT, first, "And now?")
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
    with with_tier(model, directory) as server:
        found, cached = ask(server.wait_ready(), SHORT, first, "And now?")
        assert found == second
        assert cached >= 512


def forget_all(server: Server, directory: Path) -> None:
    """Memory and disk are empty."""
    wait_written(server)
    assert kv(["empty", str(directory)]) == 0
    forget(server)


def test_a_draft_models_conversation_comes_from_disk(
    tiny_model: Path, draft_model: Path, tmp_path: Path
) -> None:
    draft = ("--draft-model", str(draft_model))
    with with_tier(tiny_model, tmp_path / "kv", *draft) as server:
        server.wait_ready()
        first, _ = ask(server, WORDS)
        wait_written(server, 2)
        expected, _ = ask(server, WORDS, first, "And now?")
        forget(server)
        text, cached = ask(server, WORDS, first, "And now?")
        assert text == expected
        assert cached >= 1024


@pytest.mark.parametrize("way", ["killed", "left", "fault"])
def test_a_prompt_that_a_draft_model_reads_too_is_not_lost(
    tiny_model: Path, draft_model: Path, tmp_path: Path, way: str
) -> None:
    """The draft model reads all of it first. What both have read is kept."""
    draft = ("--draft-model", str(draft_model))
    body = {"messages": [{"role": "user", "content": WORDS}]}
    with with_tier(tiny_model, tmp_path / "kv", *draft) as server:
        expected, _ = ask(server.wait_ready(), WORDS)
        forget_all(server, tmp_path / "kv")
        steps = -(-len(WORDS) // 128) + 10  # the tenth of the target, or one near it
        if way == "fault":
            server.plan(f"any:{steps}:8")
            assert ask(server, WORDS)[0] == expected
            came = server.metric("mlx_safe_kv_disk_restored_tokens_total")
            assert came >= 8 * 128 - 256 - 128
            return
        server.hold(steps)
        with server.connected(body):
            server.wait_held()
            wait_written(server, 3)
            if way == "killed":
                os.kill(server.process.pid, signal.SIGKILL)
                server.wait()
        if way == "left":
            server.tell("go")
            text, cached = ask(server, WORDS)
    if way == "killed":
        with with_tier(tiny_model, tmp_path / "kv", *draft) as server:
            text, cached = ask(server.wait_ready(), WORDS)
    assert text == expected
    assert cached >= 8 * 128 - 256 - 128


@pytest.mark.parametrize("path", PATHS)
def test_after_a_stray_write_the_entry_it_came_from_goes(
    tiny_model: Path, tmp_path: Path, path: str
) -> None:
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        ask(server, WORDS, **PATHS[path])
        wait_written(server, 2)
        forget(server)
        server.plan("any:1:9")
        messages = [{"role": "user", "content": WORDS}]
        answer = server.chat(messages=messages, max_tokens=4, **PATHS[path])
        assert answer.status == 500
        assert server.metric("mlx_safe_kv_disk_files") == 0
        assert not list((tmp_path / "kv").glob("*/*.kv"))


@pytest.mark.parametrize("path", PATHS)
def test_what_fails_after_it_came_from_files_is_read_again(
    plain: Server, tiny_model: Path, tmp_path: Path, path: str
) -> None:
    """An exception that is no fault: what was restored may be the cause."""
    plain.ask("forget")
    expected, _ = ask(plain, WORDS, **PATHS[path])
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        ask(server, WORDS, **PATHS[path])
        wait_written(server, 2)
        forget(server)
        server.plan("any:2:0:once:bug")
        assert ask(server, WORDS, **PATHS[path])[0] == expected
        assert "are read again" in server.log
        assert server.metric("mlx_safe_replays_total") == 1
        assert server.metric("mlx_safe_kv_disk_restored_total") == 1, "once"
        assert server.metric("mlx_safe_kv_disk_on") == 1


def test_damaged_files_are_no_failure(
    plain: Server, tiny_model: Path, tmp_path: Path
) -> None:
    plain.ask("forget")
    expected, _ = ask(plain, WORDS)
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        ask(server, WORDS)
        wait_written(server, 2)
        for file in (tmp_path / "kv").glob("*/*.kv"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        forget(server)
        assert ask(server, WORDS)[0] == expected
        assert server.metric("mlx_safe_kv_disk_damaged_total") >= 1
        assert server.metric("mlx_safe_kv_disk_on") == 1
