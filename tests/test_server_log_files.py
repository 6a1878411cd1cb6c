"""Where the log goes: a file that is moved away meanwhile, and systemd's journal."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest

from support.programs import program
from support.server import PYTHON, Server, eventually

MOVES = 6
NIGHT = program("logs_at_every_level")


def answered(server: Server) -> float:
    return server.metric("mlx_safe_requests_total", outcome="ok")


def said(folder: Path) -> list[dict[str, object]]:
    texts = [file.read_text() for file in folder.iterdir()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.mark.parametrize("supervised", [(), ("--supervise",)])
def test_a_file_is_moved_away_while_requests_end(
    tiny_model: Path, tmp_path: Path, supervised: tuple[str, ...]
) -> None:
    """As newsyslog and logrotate do it: no line is lost, and none is cut."""
    logs = tmp_path / "logs"
    logs.mkdir()
    file = logs / "serve.log"
    flags = ("--log-format", "json", "--log-file", str(file), *supervised)
    done = threading.Event()
    with Server(tiny_model, *flags) as server:
        server.wait_ready()

        def ask() -> int:
            asked = 0
            while not done.is_set():
                assert server.chat(max_tokens=2).status == 200
                asked += 1
            return asked

        counts: list[int] = []
        threads = [
            threading.Thread(target=lambda: counts.append(ask())) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for i in range(MOVES):
            before = answered(server)
            assert eventually(lambda: answered(server) >= before + 3)  # noqa: B023
            file.rename(logs / f"serve.log.{i}")
        done.set()
        for thread in threads:
            thread.join(120)
        server.stop()
        rest = server.log
    lines = said(logs)
    ended = Counter(x["id"] for x in lines if x["message"] == "request")
    assert len(ended) == sum(counts) and set(ended.values()) == {1}
    assert any("listening at" in str(x["message"]) for x in lines)
    assert bool(supervised) == any(x.get("process") == "SUPERVISOR" for x in lines)
    assert rest == ""


def refused(file: Path) -> str:
    """What a start with ``file`` says, which ends for it."""
    done = subprocess.run(
        [PYTHON, "-m", "mlx_safe", "serve", "--log-file", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    return done.stderr


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "none" / "serve.log"
    why = f"cannot be written: {os.strerror(2)}"
    assert refused(file) == f"mlx-safe: --log-file {file}: {why}\n"


def ran(name: str, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """One of the programs, which has logged into ``path``."""
    done = subprocess.run(
        [PYTHON, "-c", program(name), str(path), *more],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_one_that_cannot_be_made_anew_stops_nothing(tmp_path: Path) -> None:
    """Its folder was removed: a request must not fail for its line."""
    done = ran("logs_into_a_folder_that_goes", tmp_path / "logs")
    assert "three" in done.stdout and "two" not in done.stdout
    why, two = done.stderr.splitlines()
    assert f"cannot be written, stderr is: {os.strerror(2)}" in why
    assert two.endswith("two")


def test_what_a_full_disk_does_not_take_is_on_stderr(tmp_path: Path) -> None:
    """A line for each, as it would be in the file, where it was a traceback of 30."""
    file = tmp_path / "serve.log"
    done = ran("logs_into_a_full_disk", file)
    told, *rest = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert told.startswith("--log-file cannot be written, stderr is: ")
    assert rest == ["two", "three"]
    kept = [json.loads(line)["message"] for line in file.read_text().splitlines()]
    assert kept[0].startswith("one") and {"four", "five"} < set(kept)
    again = "--log-file can be written again; what it lacks is on stderr"
    assert kept.count(again) == 1


def test_a_full_file_that_was_moved_away_is_let_go(tmp_path: Path) -> None:
    """What had not got into it could not be written, and no other was opened."""
    file = tmp_path / "serve.log"
    ran("logs_into_a_full_disk", file, "moved")
    assert '"five"' in file.read_text()


def test_a_pipe_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    why = f"mlx-safe: --log-file {pipe}: cannot be written: "
    assert refused(pipe).startswith(why)
    lines = ran("logs_into_a_pipe", pipe).stderr.splitlines()
    messages = [json.loads(line)["message"] for line in lines]
    assert messages[0].startswith("--log-file cannot be written, stderr is: ")
    assert messages[-1].startswith("line 1999, ")


def journal(command: list[str], *, is_ours: bool) -> list[str]:
    """Lines on stderr of a process that systemd says has it for its journal."""
    read, write = os.pipe()
    there = os.fstat(write)
    stream = f"{there.st_dev}:{there.st_ino if is_ours else there.st_ino + 1}"
    subprocess.run(
        command,
        stderr=write,
        env={**os.environ, "JOURNAL_STREAM": stream},
        timeout=120,
        check=False,
    )
    os.close(write)
    with os.fdopen(read) as file:
        return file.read().splitlines()


def test_the_journal_knows_how_bad_a_line_is() -> None:
    """`journalctl -p warning` had nothing: all lines were of one priority."""
    lines = journal([PYTHON, "-c", NIGHT], is_ours=True)
    marks = Counter(line[:3] for line in lines)
    trace = [line for line in lines if line.startswith("<3>")]
    assert trace[0].endswith("a handler failed") and trace[-1] == "<3>ValueError"
    assert marks == {"<7>": 1, "<6>": 1, "<4>": 1, "<3>": len(trace), "<2>": 1}
    plain = journal([PYTHON, "-c", NIGHT], is_ours=False)
    assert not any(line.startswith("<") for line in plain)


def test_so_it_does_of_a_start_that_fails() -> None:
    serve = [PYTHON, "-m", "mlx_safe", "serve"]
    (line,) = journal([*serve, "--port=x"], is_ours=True)
    assert line.startswith("<3>mlx-safe: argument --port: ")
    (line,) = journal([*serve, "--port=x", "--log-format=json"], is_ours=True)
    assert json.loads(line.removeprefix("<3>"))["level"] == "ERROR"
