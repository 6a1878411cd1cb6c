"""The supervisor: the port stays open, whatever happens to the server."""

from __future__ import annotations

import configparser
import contextlib
import os
import plistlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_safe.server import holding
from support.programs import program
from support.server import Answer, Server, eventually

# The supervisor of a server that loads no model: it listens once the file is there
# whose path it is given as its model.
SUPERVISED = program("supervised").replace(
    'SERVER = ""', f"SERVER = {program('stub_server')!r}"
)


NOTHING_HELD = ("--hold-seconds", "0")


def serve_supervised(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A supervised server that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_safe", "serve", "--supervise", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def wait_for_log(server: Server, text: str) -> None:
    assert eventually(lambda: text in server.log, 120), server.log


def test_no_client_is_refused_over_a_fatal_fault(tiny_model: Path) -> None:
    """Asks again and again while the server dies of code 4 and comes back."""
    server = Server(tiny_model, "--supervise", inject="decode:20:4")
    with server:
        server.wait_ready()
        answers: list[Answer] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(server.chat(max_tokens=4))
                time.sleep(0.05)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads:
            t.start()
        try:
            wait_for_log(server, "ended with status 75")
            # The new server counts its steps anew, and lives as long again.
            count = len(answers)
            served = eventually(
                lambda: any(a.status == 200 for a in answers[count + 3 :]), 180
            )
        finally:
            stop.set()
            for t in threads:
                t.join(120)
        assert [a.broken for a in answers if a.broken] == []
        assert {a.status for a in answers} == {200}
        assert served


def test_a_killed_server_comes_back(tiny_model: Path) -> None:
    with Server(tiny_model, "--supervise") as server:
        server.wait_ready()
        (child,) = server.children()
        os.kill(child, signal.SIGKILL)
        wait_for_log(server, "ended by SIGKILL")
        server.wait_ready()
        assert server.chat().status == 200
        said = "INFO - SUPERVISOR - the server listens"
        assert eventually(lambda: server.log.count(said) == 2)
        assert server.children() != [child]
    assert server.process.returncode == 0


def assert_told_to_come_again(answer: Answer) -> None:
    assert answer.broken is None
    assert answer.status == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {
        "error": {
            "message": "The server is starting.",
            "type": "service_unavailable_error",
            "param": None,
            "code": "unavailable",
            "retry_after": 5,
        }
    }


def test_the_parent_answers_until_the_server_listens(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Server(go, *NOTHING_HELD, program=SUPERVISED) as server:
        server.wait_listening()
        assert_told_to_come_again(server.get("/health"))
        assert_told_to_come_again(server.chat("long " * 200_000))
        go.touch()
        assert eventually(lambda: server.get("/health").status == 200)
        wait_for_log(server, "INFO - SUPERVISOR - the server listens")
        go.unlink()
        (child,) = server.children()
        os.kill(child, signal.SIGKILL)
        # The next one is started at once, and does not listen yet.
        wait_for_log(server, "ended by SIGKILL; starting it again in 0 s")
        assert_told_to_come_again(server.get("/health"))
        assert_told_to_come_again(server.chat())
        go.touch()
        assert eventually(lambda: server.get("/health").status == 200)
        assert server.stop() == 0


# Before the program: what it finds of these is what the tests were started with.
HANDLED_AS = """
import signal
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.{})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_server_ends_with_its_parent(tmp_path: Path, number: int) -> None:
    program = HANDLED_AS.format("SIG_DFL") + SUPERVISED
    with Server(tmp_path / "never", program=program) as server:
        server.wait_listening()
        assert eventually(lambda: bool(server.children()))
        server.process.send_signal(number)
        # All have closed the output, so the child is gone, too.
        assert server.wait() == 0


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As nohup, and a shell for what it starts in the background, want it."""
    program = HANDLED_AS.format("SIG_IGN") + SUPERVISED
    with Server(tmp_path / "never", program=program) as server:
        server.wait_listening()
        for number in (signal.SIGINT, signal.SIGHUP):
            server.process.send_signal(number)
        assert_told_to_come_again(server.get("/health"))
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def drip(connection: socket.socket) -> None:
    """Sends a byte now and then, as long as it is let."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)


def test_slow_clients_keep_nobody_waiting(tmp_path: Path) -> None:
    never = tmp_path / "never"
    with Server(never, *NOTHING_HELD, program=SUPERVISED) as server:
        server.wait_listening()
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address), socket.create_connection(address) as s:
            dripping = threading.Thread(target=drip, args=(s,))
            dripping.start()
            assert_told_to_come_again(server.get("/health"))
            assert server.stop() == 0
        dripping.join(60)
        assert not dripping.is_alive()


def test_an_answer_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the client goes on sending."""
    monkeypatch.setattr(holding, "ANSWER_TIMEOUT_S", 0.2)
    ours, theirs = socket.socketpair()
    answering = threading.Thread(
        target=holding._answer, args=(ours, b"503", False), daemon=True
    )
    with theirs:
        answering.start()
        drip(theirs)
        answering.join(60)
        assert not answering.is_alive()


def test_it_gives_up_on_a_crash_loop(tiny_model: Path) -> None:
    with Server(tiny_model, "--supervise", inject="prefill:1:4:persistent") as server:
        server.wait_ready()
        seen = []
        deadline = time.monotonic() + 400
        while server.process.poll() is None and time.monotonic() < deadline:
            seen.append(server.chat().status)
            time.sleep(0.05)
        assert server.wait() == 1
        assert "giving up" in server.log
        assert 503 in seen
        assert set(seen) <= {503, None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such/model"], "there is no such directory"),
        (["--port", "99999"], "--port: must be from 0 to 65535"),
    ],
)
def test_a_users_mistake_is_not_tried_again(arguments: list[str], said: str) -> None:
    done = serve_supervised("--port", "0", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "again" not in done.stderr


def test_a_port_in_use(tiny_model: Path) -> None:
    with Server(tiny_model) as server:
        server.wait_listening()
        done = serve_supervised("--model", str(tiny_model), "--port", str(server.port))
    assert done.returncode == 2
    assert "cannot listen on" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_parent_never_imports_mlx() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, mlx_safe.server.supervisor; print('mlx' in sys.modules, "
            "'mlx.core' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
        env={**os.environ, "MLX_SAFE_AUTOINSTALL": "0"},
    )
    assert done.stdout == "False False\n"


def test_the_examples_of_the_docs() -> None:
    """Both say what to run in the same words, in a form that can be read."""
    examples = Path(__file__).parent.parent / "examples"
    systemd = configparser.ConfigParser(strict=False)
    systemd.read_string((examples / "mlx-safe.service").read_text())
    assert systemd["Service"]["Restart"] == "on-failure"
    launchd = plistlib.loads((examples / "org.mlx-safe.serve.plist").read_bytes())
    # Status 0 is the end that was asked for; 75 and a signal are not.
    assert launchd["KeepAlive"] == {"SuccessfulExit": False}
    command = launchd["ProgramArguments"]
    assert command[1:4] == ["serve", "--supervise", "--config"]
    assert systemd["Service"]["execstart"].split()[1:4] == command[1:4]
