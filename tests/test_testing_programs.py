"""Faults by the environment, in programs that know nothing of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_safe.running.command import environment
from support.programs import program

# A user's program, which knows nothing of mlx-safe.
CHAT = program("chats")
VENDORED = program("vendors_a_loader")


def run(
    program: str, model: Path, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(model)],
        env={**environment(os.environ, words), "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_program_that_is_not_changed(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run(
        CHAT, tiny_model, MLX_SAFE_INJECT="decode:3:0xe", MLX_SAFE_INJECT_LOG=str(log)
    )
    assert done.returncode == 0, done.stderr
    assert "failed after" in done.stdout and "Impacting Interactivity" in done.stdout
    assert "never fired" not in done.stderr
    events = [line.split(" ", 2) for line in log.read_text().splitlines()]
    assert [event for event, _, _ in events] == ["attached", "fired"]
    assert events[1][2] == "decode:3:14:once:raise"


@pytest.mark.parametrize(
    ("plan", "failed"),
    [("prefill:1", 1), ("prefill:2", 2), ("decode:1", 3), ("decode:2", 4)],
)
def test_a_loader_and_calls_of_its_own(
    tiny_model: Path, plan: str, failed: int
) -> None:
    done = run(VENDORED, tiny_model, MLX_SAFE_INJECT=plan)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [str(failed)]


def test_a_plan_that_never_fired_is_a_line_at_the_end(tiny_model: Path) -> None:
    done = run(CHAT, tiny_model, MLX_SAFE_INJECT="decode:99:2,prefill:1:8:once:record")
    assert done.returncode == 0 and "said 6" in done.stdout, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if "never fired" in x]
    assert line.startswith("mlx-safe: MLX_SAFE_INJECT: decode:99:2:once:raise never")
    # Of an answer of six tokens mlx-lm computes one or two more.
    assert "decode steps were counted" in line and " 0 decode" not in line


def test_who_loads_no_model_says_so_and_who_cannot_says_nothing(
    tiny_model: Path,
) -> None:
    plan = {"MLX_SAFE_INJECT": "decode:1"}
    done = run("import mlx_safe, mlx.nn", tiny_model, **plan)
    assert "no model is attached here" in done.stderr
    done = run("import mlx_safe", tiny_model, **plan)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MLX_SAFE_INJECT": "sometimes"}, "MLX_SAFE_INJECT: cannot read 'sometimes'"),
        ({"MLX_SAFE_INJECT_CEILING": "much"}, "MLX_SAFE_INJECT_CEILING must be a size"),
    ],
)
def test_what_cannot_be_read_ends_the_program_at_once(
    tiny_model: Path, variables: dict[str, str], said: str
) -> None:
    done = run(CHAT, tiny_model, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlx-safe: {said}")


def test_a_gpu_of_a_chosen_size(tiny_model: Path) -> None:
    done = run(CHAT, tiny_model, MLX_SAFE_INJECT_CEILING="100")
    assert "failed after 0" in done.stdout and "Insufficient Memory" in done.stdout
    done = run(CHAT, tiny_model, MLX_SAFE_INJECT_CEILING="64G")
    assert "said 6" in done.stdout and not done.stderr


def test_without_protection_only_the_fault_is_there(tiny_model: Path) -> None:
    program = CHAT + "import mlx_safe\nprint(mlx_safe.status().installed)"
    plan = {"MLX_SAFE_INJECT": "decode:2"}
    unprotected = {**plan, "MLX_SAFE_AUTOINSTALL": "0"}
    done = run(program, tiny_model, "unprotected", **unprotected)
    assert "failed after" in done.stdout and done.stdout.endswith("False\n")
    done = run(program, tiny_model, **plan)
    assert "failed after" in done.stdout and done.stdout.endswith("True\n")
