"""An exception that reaches std::terminate, in child processes.

Each survival is shown next to the death without us.
"""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

from support import child
from support.programs import program

THROW = """
    import time, mlx_safe
    from mlx_safe import testing
    {before}
    testing.throw_on_foreign_thread()
    time.sleep(20)
"""


def reports(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.json")) if directory.exists() else []


def throw(before: str = "", **environment: Any) -> subprocess.CompletedProcess[str]:
    return child.run(THROW.format(before=before), **environment)


def test_without_us_the_process_aborts(private_reports: Path) -> None:
    done = throw(MLX_SAFE_AUTOINSTALL="0")
    assert done.returncode == -signal.SIGABRT
    assert "terminate called after throwing" in done.stderr
    assert reports(private_reports) == []


def test_report_policy_writes_and_dies_as_before(private_reports: Path) -> None:
    done = throw()
    assert done.returncode == -signal.SIGABRT
    assert "terminate called after throwing" in done.stderr
    (path,) = reports(private_reports)
    report = json.loads(path.read_text())
    assert report["schema"] == 1
    assert report["why"] == "terminate"
    assert report["exception_type"] == "St13runtime_error"
    assert "kIOGPUCommandBufferCallbackErrorOutOfMemory" in report["exception_message"]
    assert report["code"] == 8
    assert report["policy"] == "report"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_drain_policy_tells_and_leaves_with_75(private_reports: Path) -> None:
    done = child.run(program("answers_when_drained"))
    assert done.stdout == "answered\n", done.stderr
    assert done.returncode == 75
    (path,) = reports(private_reports)
    assert json.loads(path.read_text())["policy"] == "drain"


def test_drain_gives_up_when_nobody_answers() -> None:
    done = throw('mlx_safe.install(on_terminate="drain", drain_seconds=0.3)')
    assert done.returncode == 75


def test_uninstall_puts_the_old_handler_back(private_reports: Path) -> None:
    done = throw("mlx_safe.uninstall()")
    assert done.returncode == -signal.SIGABRT
    assert reports(private_reports) == []


def test_two_threads_at_once_leave_one_report(private_reports: Path) -> None:
    done = throw(
        """
    mlx_safe.install(on_terminate="drain", drain_seconds=0.3)
    testing.throw_on_foreign_thread()
    """
    )
    assert done.returncode == 75
    assert len(reports(private_reports)) == 1


def test_a_second_thread_with_the_gil_keeps_nobody_waiting() -> None:
    done = child.run(program("terminates_twice_with_the_gil"), timeout=30)
    assert done.stdout == "answered\n", done.stderr
    assert done.returncode == 75


def test_clients_are_answered_without_a_descriptor(private_reports: Path) -> None:
    done = child.run(program("answers_without_a_descriptor"))
    assert done.stdout == "answered\n", done.stderr
    assert done.returncode == 75
    assert len(reports(private_reports)) == 1


def test_a_forked_child_dies_as_it_would_have(private_reports: Path) -> None:
    done = child.run(program("dies_after_a_fork"))
    assert done.returncode == 0, done.stderr
    assert len(reports(private_reports)) == 1


def test_while_mlx_computes(private_reports: Path) -> None:
    """As where MLX 0.31 throws: on a thread of C++, with an evaluation under way."""
    done = child.run(program("computes_while_it_ends"))
    assert done.returncode == -signal.SIGABRT
    (path,) = reports(private_reports)
    report = json.loads(path.read_text())
    assert report["why"] == "terminate" and report["code"] == 8
    assert report["context"]["mlx"]
