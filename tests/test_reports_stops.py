"""An orderly stop is no death, and each server speaks of its own deaths only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.programs import program
from support.server import Server, eventually, free_port

NOTICE = "new report"
LIMIT_S = 120.0

PROGRAM = program("stops_in_three_ways")
UVICORN = """
import sys, uvicorn, mlx_safe
mlx_safe.install()
async def app(scope, receive, send):
    pass
uvicorn.run(app, port=int(sys.argv[1]), lifespan="off")
"""


def left(directory: Path) -> list[str]:
    """What a process has left of itself."""
    return [] if not directory.exists() else [p.name for p in directory.iterdir()]


def stop(
    process: subprocess.Popen[str], number: int = signal.SIGTERM, wait_s: float = 0.0
) -> int:
    time.sleep(wait_s)
    process.send_signal(number)
    status = process.wait(LIMIT_S)
    assert process.stdout is not None
    process.stdout.close()
    return status


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("how", ["waits", "computes"])
def test_a_stop_by_a_signal(private_reports: Path, how: str, number: int) -> None:
    process = start("-c", PROGRAM, how)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert any(name.startswith("run-") for name in left(private_reports))
    assert stop(process, number) == -number
    assert left(private_reports) == []


def test_a_program_that_puts_back_what_was_there(private_reports: Path) -> None:
    process = start("-c", PROGRAM, "takes over")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert stop(process) == -signal.SIGTERM
    assert left(private_reports) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_uvicorn(private_reports: Path, number: int) -> None:
    process = start("-c", UVICORN, str(free_port()))
    assert process.stdout is not None
    while "running on" not in (line := process.stdout.readline()):
        assert line
    stop(process, number)
    assert left(private_reports) == []


def test_a_kill_is_a_death_still(private_reports: Path) -> None:
    process = start("-c", PROGRAM, "waits")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert stop(process, signal.SIGKILL) == -signal.SIGKILL
    assert [name[:4] for name in left(private_reports)] == ["run-"]


def test_an_ignored_signal_stays_ignored(private_reports: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import mlx_safe; mlx_safe.install()\n"
        "signal.raise_signal(signal.SIGTERM); mlx_safe.uninstall(); print('here')"
    )
    process = start("-c", code)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert out == "here\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("supervise", [False, True])
def test_a_server_that_is_stopped_before_it_listens(
    private_reports: Path, tiny_model: Path, number: int, supervise: bool
) -> None:
    flags = ["--supervise"] if supervise else []
    for wait_s in (0.0, 0.3):
        server = Server(tiny_model, *flags)
        # Its run file is there: it has begun, and imports MLX.
        assert eventually(
            lambda: any(n.startswith("run-") for n in left(private_reports)), 60
        )
        time.sleep(wait_s)
        server.process.send_signal(number)
        server.wait()
        for pipe in (server.process.stdin, server.process.stdout):
            assert pipe is not None
            pipe.close()
        assert eventually(lambda: left(private_reports) == []), server.log


def test_a_stop_between_the_model_and_the_clients(
    private_reports: Path, tiny_model: Path
) -> None:
    with Server(tiny_model, program=program("interrupts_itself_late")) as server:
        assert server.process.wait(LIMIT_S) == -signal.SIGINT, server.log
        assert left(private_reports) == []


@pytest.mark.parametrize("when", ["the next one starts", "none runs"])
def test_a_stop_during_a_supervised_restart(
    private_reports: Path, tiny_model: Path, when: str
) -> None:
    """The reports are those of the kills, and no other."""
    killed: list[str] = []

    def next_one() -> str | None:
        runs = [n for n in left(private_reports) if n.startswith("run-")]
        return next((n for n in runs if n[4:-5] not in killed), None)

    def kill() -> None:
        assert eventually(lambda: next_one() is not None)
        killed.append(str(next_one())[4:-5])
        os.kill(int(killed[-1]), signal.SIGKILL)
        server.wait_for_log("starting it again", len(killed))

    with Server(tiny_model, "--supervise") as server:
        server.wait_ready()
        kill()
        if when == "none runs":
            kill()  # after the second in a row it waits a second
        else:
            assert eventually(lambda: next_one() is not None)
        assert server.stop() == 0
        assert server.log.count("starting it again") == len(killed)
    assert next_one() is None
    listed = subprocess.run(
        [sys.executable, "-m", "mlx_safe", "reports", "--json"],
        capture_output=True,
        timeout=LIMIT_S,
        check=True,
    )
    found = json.loads(listed.stdout)
    assert sorted(str(report["pid"]) for report in found) == sorted(killed)
    assert {report["why"] for report in found} == {"died"}


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_death_at_the_start_is_told_wherever_the_model_is_named(
    private_reports: Path, tiny_model: Path, tmp_path: Path, where: str
) -> None:
    named = {"model": str(tiny_model), "port": free_port()}
    env = dict(os.environ)
    words = [sys.executable, "-m", "mlx_safe", "serve"]
    if where == "environment":
        env |= {f"MLX_SAFE_{k.upper()}": str(v) for k, v in named.items()}
    else:
        file = tmp_path / "server.toml"
        file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in named.items()))
        words += ["--config", str(file)]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)

    def has_named_itself() -> bool:
        files = private_reports.glob("run-*.json")
        return any('"port"' in file.read_text() for file in files)

    first = begin()
    # It imports MLX for a while yet, and does not know all flags.
    assert eventually(has_named_itself, LIMIT_S)
    (run_file,) = private_reports.glob("run-*.json")
    # And not __main__.py, which is all that Python knows of `-m` in sys.argv.
    assert json.loads(run_file.read_text())["argv0"] == "mlx-safe"
    first.kill()
    first.communicate(timeout=LIMIT_S)
    second = begin()
    assert second.stderr is not None
    said = ""
    while "listening" not in said:
        said += (line := second.stderr.readline())
        assert line, said
    second.terminate()
    second.communicate(timeout=LIMIT_S)
    assert NOTICE in said


def test_each_server_speaks_of_its_own_death(
    private_reports: Path, tiny_model: Path
) -> None:
    with Server(tiny_model) as first:
        first.wait_ready()
        port = first.port
        os.kill(first.process.pid, signal.SIGKILL)
        first.wait()
    with Server(tiny_model) as other:
        other.wait_ready()
        assert NOTICE not in other.log
    again = Server(tiny_model, "--port", str(port))  # the last of two holds
    again.port = port
    with again:
        again.wait_ready()
        assert again.log.count(NOTICE) == 1
        assert f"new report of the server on port {port} with {tiny_model}" in again.log
    (report,) = private_reports.glob("*.json")
    whose = json.loads(report.read_text())["context"]["server"]
    assert whose == {"port": str(port), "model": str(tiny_model)}
    shown = subprocess.run(
        [sys.executable, "-m", "mlx_safe", "reports", "show", report.stem],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    ).stdout
    assert f"on port {port} with" in shown
