"""``mlx-safe run``: programs that know nothing of mlx_safe."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.programs import program as text_of
from support.server import eventually, free_port

SUITE = Path(__file__).parent
LIMIT_S = 120.0
MLX_SAFE = [sys.executable, "-m", "mlx_safe"]
IS_PROTECTED = """
import sys, mlx.core
print(sys.argv[1:], "mlx_safe" in sys.modules)
"""


def mlx_safe_run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MLX_SAFE, "run", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
        check=False,
    )


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(text)
    return str(path)


def test_a_program_is_protected_as_soon_as_it_has_mlx(tmp_path: Path) -> None:
    path = program(tmp_path, IS_PROTECTED)
    done = mlx_safe_run("--", sys.executable, path, "--supervise", "x")
    assert done.stdout == "['--supervise', 'x'] True\n", done.stderr
    assert done.returncode == 0


def test_what_has_no_mlx_is_left_alone() -> None:
    code = "import sys; print([m for m in sys.modules if m.startswith('mlx')])"
    assert mlx_safe_run(sys.executable, "-c", code).stdout == "[]\n"


def test_children_that_are_spawned_and_what_is_executed_next(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        text_of("spawns_and_executes"),
    )
    done = mlx_safe_run("--", sys.executable, path)
    assert done.stdout == "spawned True\nexecuted True\n", done.stderr


def test_the_environments_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("print('own')\n")
    path = program(tmp_path, IS_PROTECTED)
    done = mlx_safe_run("--", sys.executable, path, PYTHONPATH=str(own))
    # Once in mlx-safe itself, which becomes the program.
    assert done.stdout == "own\nown\n[] True\n", done.stderr


def test_replay_protects_the_batches_of_a_program(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "from mlx_lm.generate import BatchGenerator as cls\n"
        "print(cls._next.__module__)\n",
    )
    done = mlx_safe_run("--replay", "--", sys.executable, path)
    assert done.stdout == "mlx_safe.mlx_lm.batch\n", done.stderr
    done = mlx_safe_run("--", sys.executable, path)
    assert done.stdout == "mlx_lm.generate\n", done.stderr


def test_a_death_leaves_a_report(tmp_path: Path, private_reports: Path) -> None:
    path = program(
        tmp_path,
        """
import mlx.core, time
from mlx_safe import testing  # to make the fault; the program itself needs it not
testing.throw_on_foreign_thread()
time.sleep(300)
""",
    )
    done = mlx_safe_run("--", sys.executable, path)
    assert done.returncode == -signal.SIGABRT
    (report,) = private_reports.rglob("*.json")
    assert json.loads(report.read_text())["why"] == "terminate"


@pytest.mark.parametrize("how", [(), ("--supervise",)], ids=["once", "supervise"])
def test_a_program_without_mlx_leaves_no_report(
    private_reports: Path, how: tuple[str, ...]
) -> None:
    """It becomes what was `mlx-safe`, which had a run file."""
    assert mlx_safe_run(*how, "--", "true").returncode == 0
    # Who looks for those that have died.
    done = mlx_safe_run("--", sys.executable, "-c", "import mlx.core")
    assert done.stderr == ""
    assert not [p for p in private_reports.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no program is named: mlx-safe run [options] -- COMMAND ..."),
        (("--", "no-such-program"), "no-such-program: no such command"),
        (("--", ""), "'': no such command"),
        (
            ("--", "-m", "json.tool"),
            "-m: no command begins with a dash; put options of mlx-safe",
        ),
        (("--listen", "0", "--", "true"), "--listen needs --supervise"),
        (
            ("--supervise", "--listen", "0", "--", "true"),
            "--listen needs {fd} in the command, and {fd} needs --listen",
        ),
        (
            ("--supervise", "--listen", "x:y", "--", "true", "{fd}"),
            "--listen x:y: must be a port, or HOST:PORT",
        ),
        (
            ("--supervise", "--listen", "99999", "--", "true", "{fd}"),
            "--listen 99999: must be a port, or HOST:PORT",
        ),
        *(
            (
                ("--supervise", "--listen", where, "--", "true", "{fd}"),
                f"--listen {where}: must be a port, or HOST:PORT, such as [::1]:8000",
            )
            for where in ("", ":80", "::1", "[::1]", "unix:/tmp/socket")
        ),
        (
            ("--supervise", "--listen", "a.invalid:80", "--", "true", "{fd}"),
            "--listen a.invalid:80: ",
        ),
        (("--sometimes", "--", "true"), "unrecognized arguments: --sometimes"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = mlx_safe_run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mlx-safe: {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", [(), ("--supervise",)], ids=["once", "supervise"])
@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("print(1)", 0o600, "is no program; a script runs as: python "),
        ("print(1)", 0o700, "cannot be started: has no #! line"),
        ("#!/no/such/python", 0o700, "cannot be started: the interpreter that"),
    ],
)
def test_what_cannot_be_executed_is_one_line(
    tmp_path: Path, how: tuple[str, ...], text: str, mode: int, said: str
) -> None:
    path = tmp_path / "script"
    path.write_text(text)
    path.chmod(mode)
    done = mlx_safe_run(*how, "--", str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"mlx-safe: {path}: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_a_program_that_looks_for_mlx_before_is_protected(tmp_path: Path) -> None:
    look = "import importlib.util\nassert importlib.util.find_spec('mlx.core')\n"
    path = program(tmp_path, look + IS_PROTECTED)
    done = mlx_safe_run("--", sys.executable, path)
    assert done.stdout == "[] True\n", done.stderr


COUNTS_INTERRUPTS = text_of("counts_interrupts")


@pytest.mark.parametrize("where", ["beside", "apart"])
def test_control_c_reaches_the_program_once(tmp_path: Path, where: str) -> None:
    """The terminal tells all in its foreground; the supervisor, those that are not."""
    path = program(tmp_path, COUNTS_INTERRUPTS)
    ready, seen, go_on = (tmp_path / name for name in ("ready", "seen", "go_on"))
    command = [sys.executable, path, *map(str, (ready, seen, go_on)), where]
    words = [*MLX_SAFE, "run", "--supervise", "--", *command]
    ended: list[int] = []
    pid, terminal = pty.fork()
    if pid == 0:
        # Shells ignore it for what they start in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(words[0], words)
    try:
        assert eventually(ready.exists)
        # Two that come at once are one for the program. So the supervisor acts on its
        # own only when the program has seen the terminal's.
        os.kill(pid, signal.SIGSTOP)
        os.write(terminal, b"\x03")
        if where == "beside":
            assert eventually(seen.exists)
        os.kill(pid, signal.SIGCONT)
        go_on.touch()

        def has_ended() -> bool:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended.append(os.waitstatus_to_exitcode(status))
            return bool(ended)

        assert eventually(has_ended)
        assert ended == [1]
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def test_supervise_starts_what_a_fault_has_ended_again(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        text_of("ends_in_three_ways"),
    )
    done = mlx_safe_run("--supervise", "--", sys.executable, path, str(tmp_path / "n"))
    assert done.returncode == 3
    assert (tmp_path / "n").read_text() == "xxx"
    assert "ended with status 75; starting it again in 0 s" in done.stderr
    assert "ended by SIGKILL; starting it again in 1 s" in done.stderr


def test_supervise_gives_up_on_what_dies_each_time() -> None:
    code = (
        "import sys; from mlx_safe.running import restarts; "
        "restarts.BACK_OFF_S = (0.0,); "
        "sys.exit(restarts.Restarts(['/bin/sh', '-c', 'exit 75'], {}, None).run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "6 times in a row, with status 75: giving up" in done.stderr


def get(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}{path}", timeout=60
        ) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*MLX_SAFE, "run", *words], cwd=SUITE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # its supervisor passes it on
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=60)


UVICORN = [sys.executable, "-m", "uvicorn", "--factory", "support.asgi_app:make"]


def test_an_application_that_is_not_changed_answers_and_comes_back() -> None:
    port = free_port()
    words = ["--supervise", "--asgi", "--listen", str(port), "--", *UVICORN]
    with running(*words, "--fd", "{fd}") as process:
        assert eventually(lambda: listens(port))
        assert get(port, "/background")[0] == 200
        status, body = get(port, "/raises")
        assert status == 503
        assert json.loads(body)["error"]["code"] == "metal_out_of_memory"
        status, body = get(port, "/dies")
        assert status == 503

        # The socket stays open: nobody is refused. Only what uvicorn accepts in the
        # moment of the end is cut, before its answer or within it.
        def served() -> bool:
            try:
                return get(port, "/background")[0] == 200
            except (ConnectionResetError, http.client.HTTPException):
                return False
            except urllib.error.URLError as e:
                assert not isinstance(e.reason, ConnectionRefusedError)
                return False

        assert eventually(served)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 128 + signal.SIGTERM)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_nobody_is_refused_over_a_restart(host: str) -> None:
    """Who comes while no program serves waits for the next one."""
    name = f"[{host}]" if ":" in host else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, 0), family=family) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip(f"this machine has no {host}")
    words = ["--supervise", "--asgi", "--listen", f"{name}:{port}", "--", *UVICORN]
    seen: list[str] = []
    begun = ended = False

    def ask(path: str = "/background") -> str:
        connection = http.client.HTTPConnection(host, port, timeout=LIMIT_S)
        try:
            with contextlib.closing(connection):
                connection.request("GET", path)
                return str(connection.getresponse().status)
        except ConnectionRefusedError:
            return "refused"
        except (OSError, http.client.HTTPException):
            return "cut"

    def ask_on() -> None:
        while not ended:
            seen.append(ask())

    with running(*words, "--fd", "{fd}"):
        assert eventually(lambda: ask() == "200")
        threads = [threading.Thread(target=ask_on) for _ in range(6)]
        for thread in threads:
            thread.start()
        begun = eventually(lambda: "200" in seen)
        died = ask("/dies")
        before = len(seen)
        came_back = eventually(lambda: "200" in seen[before:])
        ended = True
        for thread in threads:
            thread.join(LIMIT_S)
    assert begun and came_back
    assert died == "503"
    assert "refused" not in seen


LIVES_ON = text_of("lives_on_after_signals")


def test_a_signal_that_the_program_lives_on_after_is_no_stop(tmp_path: Path) -> None:
    """As for programs that read their configuration anew after SIGHUP."""
    path = program(tmp_path, LIVES_ON)
    starts = tmp_path / "starts"
    command = (sys.executable, path, str(tmp_path))
    with running("--supervise", "--", *command) as process:
        assert eventually(starts.exists)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            process.send_signal(number)
            assert eventually((tmp_path / number.name).exists), number
        (tmp_path / "end").touch()
        assert eventually(lambda: starts.read_text() == "xx")
        process.send_signal(signal.SIGQUIT)
        assert process.wait(60) == 128 + signal.SIGQUIT


def test_one_that_ends_by_the_signal_it_was_sent_was_to_end(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with running(
        "--supervise", "--", "sh", "-c", f"touch {ready}; exec sleep 300"
    ) as it:
        assert eventually(ready.exists)
        it.send_signal(signal.SIGHUP)
        assert it.wait(60) == 128 + signal.SIGHUP


def test_a_signal_that_comes_while_the_program_is_started_reaches_it() -> None:
    code = text_of("hangs_up_while_it_starts")
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=LIMIT_S, check=False, capture_output=True
    )
    assert done.returncode == 128 + signal.SIGHUP, done.stderr


def test_a_stop_ends_the_program_too(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(300)\n",
    )
    seen = tmp_path / "pid"
    with running("--supervise", "--", sys.executable, path, str(seen)) as process:
        eventually(lambda: seen.exists() and seen.read_text() != "")
        pid = int(seen.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
