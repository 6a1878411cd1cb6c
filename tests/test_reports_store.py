"""The directory of the reports: what is kept, told, and made of the dead."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_safe import _paths
from mlx_safe.forensics import orphans, reader, startup, store, words
from support import child, reports

# ---- the directory -------------------------------------------------------------


def test_the_newest_is_last(private_reports: Path) -> None:
    for name in ("9-1.json", "10-3-2.json", "10-3.json", "10-20.json", "10-3-10.json"):
        reports.write(private_reports, reports.sample(), name)
    listed = [entry.id for entry in store.entries(private_reports)]
    assert listed == ["9-1", "10-3", "10-3-2", "10-3-10", "10-20"]
    assert store.entries(private_reports / "none") == []


def test_one_that_goes_meanwhile_hides_no_other(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write and prune here, too."""
    reports.write(private_reports, reports.sample(), "1-1.json")
    names = {*reports.names(private_reports), "2-1.json", ".run-17"}
    monkeypatch.setattr(store, "_names", lambda directory: names)
    assert [entry.id for entry in store.entries(private_reports)] == ["1-1"]


def test_one_that_comes_while_others_are_pruned_stays_told(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports.write(private_reports, reports.sample(), "1-1.json")
    entries = store.entries

    def entries_then_another(directory: Path) -> list[store.Entry]:
        found = entries(directory)
        reports.write(private_reports, reports.sample(), "2-1.json")
        assert store.mark_announced(entries(directory)[-1])
        return found

    monkeypatch.setattr(store, "entries", entries_then_another)
    store.prune(private_reports)
    assert reports.names(private_reports) == ["1-1.json", "2-1.json", "2-1.json.told"]


FOREIGN = ("notes.txt", "a.json", "12-ab.json", "1-2.json.bak", ".told", "x.told")


def test_the_oldest_go_by_count(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP", "3")
    for second in range(1, 8):
        reports.write(private_reports, reports.sample(), f"{second}-1.json")
        store.mark_seen(store.entries(private_reports)[-1])
    for name in FOREIGN:
        reports.write(private_reports, b"", name)
    (private_reports / "3-1.json").unlink()
    (private_reports / "elsewhere").mkdir()
    removed = store.prune(private_reports)
    assert [entry.id for entry in removed] == ["1-1", "2-1", "4-1"]
    assert reports.names(private_reports) == sorted(
        [*FOREIGN, "elsewhere"]
        + [f"{n}-1.json{suffix}" for n in (5, 6, 7) for suffix in ("", ".seen")]
    )
    for entry in store.entries(private_reports):
        assert entry.path.stat().st_mode & 0o777 == 0o600
        assert Path(f"{entry.path}.seen").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP", "0")
    store.prune(private_reports)
    assert reports.names(private_reports) == sorted([*FOREIGN, "elsewhere"])


def test_the_oldest_go_by_bytes(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP_BYTES", "2500")
    for second in range(1, 6):
        reports.write(private_reports, b"x" * 1000, f"{second}-1.json")
    store.prune(private_reports)
    assert reports.names(private_reports) == ["4-1.json", "5-1.json"]
    reports.write(private_reports, b"x" * 5000, "6-1.json")
    store.prune(private_reports)
    assert reports.names(private_reports) == ["6-1.json"]  # never the newest


def test_limits_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.limits() == (50, 20 * 10**6)
    for text in ("many", "-1", "1.5", "9" * 40, "٣"):
        monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP", text)
        assert store.limits() == (50, 20 * 10**6)
        assert "MLX_SAFE_REPORTS_KEEP must be a whole number" in caplog.text
        caplog.clear()


def test_a_report_that_cannot_be_removed(
    private_reports: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (private_reports / "1-1.json").mkdir(parents=True)
    reports.write(private_reports, reports.sample(), "2-1.json")
    monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP", "1")
    assert store.prune(private_reports) == []
    assert "cannot remove" in caplog.text


# ---- at the next start -----------------------------------------------------------

START = "import mlx_safe"
NOTICE = "see it with: mlx-safe reports show"


def test_the_next_start_says_so_once(private_reports: Path) -> None:
    done = child.run(
        """
        import time, mlx_safe
        from mlx_safe import testing
        testing.throw_on_foreign_thread()
        time.sleep(200)
        """
    )
    assert NOTICE not in done.stderr
    (entry,) = store.entries(private_reports)
    (line,) = child.run(START).stderr.splitlines()
    assert str(entry.path) in line
    assert "out of memory (code 8)" in line
    assert line.endswith(f"mlx-safe reports show {entry.path}")
    assert child.run(START).stderr == ""
    assert store.entries(private_reports)[0].path == entry.path


def test_nothing_is_looked_at_where_nothing_is_new(private_reports: Path) -> None:
    """It costs tens of milliseconds, at import."""
    for name in FOREIGN:
        reports.write(private_reports, b"", name)
    reports.write(private_reports, reports.sample())
    done = child.run(START + "; import sys; print('mlx_safe.forensics' in sys.modules)")
    assert done.stdout == "True\n"
    done = child.run(START + "; import sys; print('mlx_safe.forensics' in sys.modules)")
    assert done.stdout == "False\n"


def test_of_several_that_start_at_once_one_says_so(
    private_reports: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(20):
        reports.write(private_reports, reports.sample(), f"{second}-1.json")
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait(200)
        startup.tend(str(private_reports))

    run_in_threads(start, 8)
    told = [r for r in caplog.records if NOTICE in r.getMessage()]
    before = [re.search(r"and (\d+) before it", r.getMessage()) for r in told]
    assert sum(1 + int(m[1] if m else 0) for m in before) == 20


def run_in_threads(target: Any, count: int) -> None:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)


def test_the_command_leaves_the_line_to_the_server(
    private_reports: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """`mlx-safe reports` and `status` must not use it up."""
    reports.write(private_reports, reports.sample())
    command = [sys.executable, "-m", "mlx_safe"]

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, **env},
        )

    assert NOTICE not in run("status").stderr
    reports.run_file(private_reports, dead := reports.a_pid_that_is_gone())
    listed = run("reports")
    assert re.search(rf"died +{dead} +new", listed.stdout)
    assert NOTICE not in listed.stderr
    assert " new " in listed.stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:  # it ends by itself
        port = str(taken.getsockname()[1])
        log = run("serve", "--model", str(tiny_model), "--port", port).stderr
    (line,) = [line for line in log.splitlines() if NOTICE in line]
    assert " - WARNING - new report (and 1 before it): " in line
    # As another user would type it, whose reports are elsewhere.
    words = shlex.split(line.partition("see it with: ")[2])
    elsewhere = {"MLX_SAFE_REPORT_DIR": str(tmp_path / "elsewhere")}
    shown = run(*words[1:], **elsewhere)
    assert shown.returncode == 0 and "killed" in shown.stdout, shown.stderr


def test_whatever_lies_there_install_goes_on(private_reports: Path) -> None:
    (private_reports / "1-1.json").mkdir(parents=True)
    reports.write(private_reports, b"\xff\0{[", "2-1.json")
    reports.write(private_reports, b"\xff\0{[", "run-0.json")
    reports.write(private_reports, b"", f"run-{'9' * 10}.json")
    (private_reports / f"run-{reports.a_pid_that_is_gone()}.json").mkdir()
    done = child.run(
        """
        import mlx_safe
        status = mlx_safe.status()
        assert status.terminate_handler
        assert not any("not looked at" in r for r in status.reasons), status.reasons
        """
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# ---- those who left no report ----------------------------------------------------


def test_one_that_was_killed_becomes_a_report(private_reports: Path) -> None:
    pid = reports.a_pid_that_is_gone()
    left = reports.run_file(private_reports, pid)
    (path,) = orphans.adopt(private_reports)
    assert not left.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    report = reader.read(path)
    assert report.problems == []
    assert (report.why, report.pid, report.time_ns) == ("died", pid, reports.NOW_NS)
    assert report.memory is not None
    assert report.memory.active == 17 * reports.GIB
    assert "near its own limit" in words.advice(report)
    assert [entry.path for entry in store.entries(private_reports)] == [path]
    assert orphans.adopt(private_reports) == []


def test_an_empty_report_and_its_run_file_are_one_death(private_reports: Path) -> None:
    pid = reports.a_pid_that_is_gone()
    left = reports.run_file(private_reports, pid)
    written = int(left.stat().st_mtime)
    before = reports.write(private_reports, b"", f"{written - 5}-{pid}.json")
    empty = reports.write(private_reports, b"", f"{written}-{pid}.json")
    assert orphans.adopt(private_reports) == [empty]
    assert sorted(private_reports.iterdir()) == [before, empty]
    report = reader.read(empty)
    assert report.unwritten and report.complete and report.problems == []
    assert report.memory is not None and report.memory.active == 17 * reports.GIB


def test_a_damaged_run_file_becomes_a_report_too(private_reports: Path) -> None:
    pid = reports.a_pid_that_is_gone()
    cut = json.dumps({"why": "running", "memory": {"active": 5}, "requests": []})
    reports.write(private_reports, cut[:-6].encode(), f"run-{pid}.json")
    (path,) = orphans.adopt(private_reports)
    report = reader.read(path)
    assert report.problems == []
    assert report.why == "died"
    assert report.memory is not None
    assert report.memory.active == 5
    assert report.time_ns is not None  # of the file


def test_of_two_that_start_at_once_one_makes_the_report(private_reports: Path) -> None:
    reports.run_file(private_reports, reports.a_pid_that_is_gone())
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", START], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [starter.communicate(timeout=300)[1] for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0]
    (entry,) = store.entries(private_reports)
    assert reader.read(entry.path).why == "died"
    assert "".join(said).count(NOTICE) == 1


def test_of_many_threads_one_adopts(private_reports: Path) -> None:
    pids = [reports.a_pid_that_is_gone() for _ in range(3)]
    for pid in pids:
        reports.run_file(private_reports, pid)
    made: list[Path] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait(200)
        made.extend(orphans.adopt(private_reports))

    run_in_threads(start, 8)
    assert len(made) == len(pids)
    assert {reader.read(path).pid for path in made} == set(pids)


def test_one_that_lives_is_left_alone(private_reports: Path) -> None:
    reports.run_file(private_reports, os.getpid())
    assert not _paths.has_news(str(private_reports))
    assert orphans.adopt(private_reports) == []
    assert reports.names(private_reports) == [f"run-{os.getpid()}.json"]


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_link_is_not_taken_for_a_run_file(
    private_reports: Path, tmp_path: Path, make: Callable[[str, str], None]
) -> None:
    """Who may write to the directory must not choose what we overwrite."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    private_reports.mkdir()
    name = f"run-{reports.a_pid_that_is_gone()}.json"
    make(str(victim), str(private_reports / name))
    assert orphans.adopt(private_reports) == []
    assert reports.names(private_reports) == [name]
    assert victim.read_text() == "precious"


def test_a_number_that_is_used_again_does_not_hide_the_dead(
    private_reports: Path,
) -> None:
    """In a container the next process often has the number of the last."""
    left = reports.run_file(private_reports, os.getpid())
    before_any_process = 1_000_000_000
    os.utime(left, (before_any_process, before_any_process))
    assert _paths.has_news(str(private_reports))
    (path,) = orphans.adopt(private_reports)
    assert reader.read(path).why == "died"


def test_after_a_boot_the_number_may_be_another_users(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_ours(_: int, __: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", not_ours)
    left = reports.run_file(private_reports, os.getpid())
    assert _paths.process_lives(str(left), os.getpid())
    os.utime(left, (1_000_000_000, 1_000_000_000))
    assert not _paths.process_lives(str(left), os.getpid())


@pytest.mark.skipif(sys.platform != "linux", reason="there only the system tells")
def test_one_that_was_not_waited_for_is_dead(private_reports: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child_process:
        reports.run_file(private_reports, child_process.pid)
        os.waitid(os.P_PID, child_process.pid, os.WEXITED | os.WNOWAIT)
        (path,) = orphans.adopt(private_reports)
    assert reader.read(path).pid == child_process.pid


def test_where_only_the_boot_is_known(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: a file from before the boot is nobody's."""
    monkeypatch.setattr(sys, "platform", "darwin")
    left = reports.run_file(private_reports, os.getpid())
    assert _paths.process_lives(str(left), os.getpid())
    os.utime(left, (1_000_000_000, 1_000_000_000))
    assert not _paths.process_lives(str(left), os.getpid())
