"""A server that is forked begins as one that is a Python of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from support import child, warm
from support.programs import program

LOOKS = program("looks_around")
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_it_finds_what_a_python_of_its_own_finds() -> None:
    def look(run: Run) -> Any:
        done = run(LOOKS, HF_HUB_OFFLINE="1", MLX_SAFE_INJECT="decode:3")
        assert done.returncode == 7, done.stderr
        return json.loads(done.stdout)

    found = look(warm.run)
    assert found == look(child.run)
    assert found["parent"] == os.getpid() and found["imported"] == []


def test_what_it_imports_is_there_already() -> None:
    if warm.forks() is None:
        pytest.skip("servers are not forked here")
    done = warm.run("import sys; sys.exit('transformers' not in sys.modules)")
    assert done.returncode == 0


def test_how_it_ends_is_told() -> None:
    killed = warm.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    failed = warm.run("raise LookupError('here')")
    assert failed.returncode == 1 and failed.stderr.endswith("LookupError: here\n")
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run("import time; time.sleep(600)", timeout=0.1)


def test_variables_that_are_read_early_are_read() -> None:
    code = "import sys; sys.exit('transformers' in sys.modules)"
    assert warm.run(code, HF_HOME="/another").returncode == 0
    assert warm.run("import sys; sys.exit(sys.flags.dev_mode)").returncode == 0
    done = warm.run("import sys; sys.exit(sys.flags.dev_mode)", PYTHONDEVMODE="1")
    assert done.returncode == 1


def test_it_is_a_child_of_the_tests_from_its_first_line_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where what has forked it takes its time to end."""
    if (before := warm.forks()) is None:
        pytest.skip("servers are not forked here")
    said = "asked.send(str(pid).encode())"
    slow = program("forks_servers").replace(said, f"{said}; time.sleep(0.5)")
    assert "sleep(0.5)" in slow
    monkeypatch.setattr(warm, "program", lambda _: slow)
    forks = warm.Forks(before.environment)
    monkeypatch.setattr(warm, "forks", lambda: forks)
    try:
        done = warm.run(f"import os, sys; sys.exit(os.getppid() != {os.getpid()})")
    finally:
        forks.end()
    assert done.returncode == 0
