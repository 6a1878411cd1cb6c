"""Conversations on disk: exact after the end of the process, and after any fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import CONTROLLED, Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
WORDS = " ".join(f"{n} ships" for n in range(330))
STEP = ("--prefill-step-size", "128")


def ask(server: Server, *turns: str, **more: Any) -> tuple[str, int]:
    """The answer's text, and how many tokens of the prompt were not read."""
    roles = ["user", "assistant"] * len(turns)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, turns, strict=False)
    ]
    answer = server.chat(messages=messages, max_tokens=12, temperature=0.0, **more)
    assert answer.status == 200, answer.json
    details = answer.json["usage"].get("prompt_tokens_details") or {}
    return answer.text, details.get("cached_tokens", 0)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[Server]:
    """One without a tier, whose prompt cache is emptied before each question."""
    with Server(tiny_model, *STEP, program=CONTROLLED) as server:
        yield server.wait_ready()


def with_tier(model: Path, directory: Path, *more: str) -> Server:
    arguments = ("--kv-dir", str(directory), *STEP, *more)
    return Server(model, *arguments, program=CONTROLLED)


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
def test_after_a_stray_write_the_entry_it_came_from_goes(
    tiny_model: Path, tmp_path: Path, path: str
) -> None:
    with with_tier(tiny_model, tmp_path / "kv") as server:
        server.wait_ready()
        ask(server, WORDS, **PATHS[path])
        wait_written(server, 2)
        server.ask("forget")
        server.plan("any:1:9")
        messages = [{"role": "user", "content": WORDS}]
        answer = server.chat(messages=messages, max_tokens=4, **PATHS[path])
        assert answer.status == 500
        assert server.metric("mlx_safe_kv_disk_files") == 0
        assert not list((tmp_path / "kv").glob("*/*.kv"))


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
        server.ask("forget")
        assert ask(server, WORDS)[0] == expected
        assert server.metric("mlx_safe_kv_disk_damaged_total") >= 1
        assert server.metric("mlx_safe_kv_disk_on") == 1
