"""A restart is a pause: what the supervisor holds, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.server import begun, handover, holding, supervisor
from mlx_safe.server.request_file import RequestFile
from support.programs import program
from support.server import Answer, Server, eventually
from test_supervisor import SUPERVISED

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"text": "hello " * 400, "max_tokens": 300}


def kill_the_server(server: Server) -> None:
    (child,) = server.children()
    ended = server.log.count("ended by SIGKILL")
    os.kill(child, signal.SIGKILL)
    server.wait_for_log("ended by SIGKILL", ended + 1)


def in_background(call: Callable[[], Answer]) -> Callable[[], Answer]:
    """Calls ``call`` on a thread; what is returned waits for its answer."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()

    def wait() -> Answer:
        thread.join(120)
        return answers[0]

    return wait


def raw_chat(**more: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **more}
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Any:
    with Server(tiny_model, "--supervise").wait_ready() as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_had_no_answer_yet_is_run_by_the_next(
    server: Server, path: str, stream: bool
) -> None:
    server.wait_ready()
    alone = server.chat(**LONG, **PATHS[path])
    more = {**PATHS[path], "stream": stream}
    if stream:  # its prompt is being read for long enough
        more.update(text=f"{path} " + "y" * 6_000, max_tokens=8)
        wait = in_background(lambda: server.chat(**more))
    else:
        wait = in_background(lambda: server.chat(**LONG, **more))
    server.wait_for_requests(1)
    kill_the_server(server)
    answer = wait()
    assert answer.broken is None
    assert answer.status == 200
    if stream:
        assert answer.done
    else:
        assert answer.text == alone.text


def test_what_was_being_read_is_read_on_by_the_next(server: Server) -> None:
    request = raw_chat(padding="x" * 200_000)
    with socket.create_connection(("127.0.0.1", server.port), 90) as s:
        s.sendall(request[:100_000])
        time.sleep(0.3)  # the server reads it, or finds it: both must do
        kill_the_server(server)
        s.sendall(request[100_000:])
        assert s.recv(12) == b"HTTP/1.1 200"


def test_connections_that_were_kept_live_on(server: Server) -> None:
    server.wait_ready()
    with contextlib.closing(server.connect()) as connection:
        local = connection.sock.getsockname()
        for _ in range(2):
            connection.request("POST", CHAT, raw_chat().split(b"\r\n\r\n")[1])
            assert connection.getresponse().read()
            assert connection.sock.getsockname() == local
            kill_the_server(server)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        assert connection.sock.getsockname() == local


def test_who_left_while_it_was_held_is_not_served(server: Server) -> None:
    server.wait_ready()
    with socket.create_connection(("127.0.0.1", server.port), 90) as s:
        s.sendall(raw_chat(max_tokens=100_000))
        server.wait_for_requests(1)
        kill_the_server(server)
    assert server.chat().status == 200
    assert eventually(lambda: server.metric("mlx_safe_requests_in_flight") == 0)


def test_a_request_that_kills_is_not_run_for_ever(tiny_model: Path) -> None:
    inject = "prefill:1:4:persistent"
    with Server(tiny_model, "--supervise", inject=inject).wait_ready() as server:
        answer = server.chat()
        assert answer.status == 503
        assert answer.broken is None
        assert int(answer.headers["retry-after"]) >= 1
        server.wait_for_log("ended with status 75", holding.DEATHS_MAX)
        server.wait_ready()  # another one is there, and lives
        assert server.log.count("ended with status 75") == holding.DEATHS_MAX


def test_who_waits_is_not_refused_with_what_kills(server: Server) -> None:
    """It was in no step when the servers died, however often they did."""
    server.wait_ready()
    kills = in_background(lambda: server.chat("kills", seed=1, max_tokens=100_000))
    server.wait_for_requests(1)
    waits = [in_background(lambda: server.chat(max_tokens=2)) for _ in range(6)]
    assert eventually(lambda: server.metric("mlx_safe_requests_in_flight") == 7)
    for _ in range(holding.DEATHS_MAX):
        assert eventually(lambda: is_generated_alone(server))
        kill_the_server(server)
        server.wait_ready()
    assert [wait().status for wait in waits] == [200] * 6
    answer = kills()
    assert answer.status == 503
    assert answer.error["message"] == holding.SUSPECT


def test_who_was_in_the_batch_of_what_kills_is_answered(tiny_model: Path) -> None:
    """It is run alone when two servers have died, and so is each of the others."""
    code = program("dies_of_one_request")
    code = f"PROGRAM = {code!r}\n{program('supervises_a_text')}"
    texts = [f"client {i} " + "and more " * i for i in range(3)]
    env = {"BATCH": "4"}
    with Server(tiny_model, program=code, env=env).wait_ready() as server:
        alone = [server.chat(text, max_tokens=40).text for text in texts]
        kills = in_background(lambda: server.chat(max_tokens=977))
        others = [
            in_background(functools.partial(server.chat, text, max_tokens=40))
            for text in texts
        ]
        assert [wait().text for wait in others] == alone
        answer = kills()
        assert answer.status == 503
        assert answer.error["message"] == holding.SUSPECT
        assert server.chat().status == 200
        assert server.log.count("ended by SIGKILL") == holding.DEATHS_MAX


def is_generated_alone(server: Server) -> bool:
    requests = json.loads(server.get("/status.json").body)["requests"]["list"]
    return any(request["alone"] and request["produced"] for request in requests)


def test_who_waits_for_a_model_is_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The servers died while they loaded it: the request had no part in that."""
    code = program("loads_the_third_time")
    code = f"PROGRAM = {code!r}\n{program('supervises_a_text')}"
    env = {"LIVES": str(tmp_path / "lives")}
    with Server(tiny_model, program=code, env=env) as server:
        server.wait_for_log("the server listens")
        wait = in_background(server.chat)
        for life in range(1, holding.DEATHS_MAX + 1):
            server.wait_for_log("the server listens", life)
            time.sleep(0.5)  # it has the request by now, or not: both must do
            kill_the_server(server)
        answer = wait()
        assert answer.status == 200, answer


def test_who_still_sends_holds_up_no_restart(tiny_model: Path) -> None:
    request = raw_chat()
    inject = "decode:20:4"
    with Server(tiny_model, "--supervise", inject=inject).wait_ready() as server:
        with (
            socket.create_connection(("127.0.0.1", server.port), 90) as silent,
            socket.create_connection(("127.0.0.1", server.port), 90) as slow,
        ):
            slow.sendall(request[:-10])
            assert server.chat(max_tokens=15).status == 200
            assert server.chat(max_tokens=15).status == 200
            assert "could not be answered" not in server.log
            slow.sendall(request[-10:])
            silent.sendall(request)
            for s in (slow, silent):
                assert s.recv(12) == b"HTTP/1.1 200"
        assert server.log.count("ended with status 75") >= 1


def test_who_comes_while_there_is_no_server_waits_for_it(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Server(go, program=SUPERVISED) as server:
        server.wait_listening()
        waits = [in_background(lambda: server.get("/v1/models")) for _ in range(5)]
        # Who asks whether there is a server is told so.
        assert server.get("/health").status == 503
        go.touch()
        assert [wait().status for wait in waits] == [200] * 5


def test_who_has_waited_long_enough_is_told_to_come_again(tmp_path: Path) -> None:
    more = ("--hold-seconds", "0.5")
    with Server(tmp_path / "never", *more, program=SUPERVISED) as server:
        server.wait_listening()
        begin = time.monotonic()
        for answer in (server.get("/v1/models"), server.chat("x" * 100_000)):
            assert answer.broken is None
            assert answer.status == 503
            assert answer.error["code"] == "unavailable"
        assert time.monotonic() - begin >= 1.0


def test_no_more_are_held_than_may_be(tmp_path: Path) -> None:
    program = "from mlx_safe.server import holding\nholding.CONNECTIONS_MAX = 2\n"
    with Server(tmp_path / "never", program=program + SUPERVISED) as server:
        server.wait_listening()
        with contextlib.ExitStack() as stack:
            address = ("127.0.0.1", server.port)
            for _ in range(2):
                s = stack.enter_context(socket.create_connection(address))
                s.sendall(raw_chat())
            assert eventually(lambda: server.chat(timeout=5).status == 503)


def test_who_is_held_is_told_when_it_ends(tmp_path: Path) -> None:
    with Server(tmp_path / "never", program=SUPERVISED) as server:
        server.wait_listening()
        with socket.create_connection(("127.0.0.1", server.port), 60) as s:
            s.sendall(raw_chat())
            assert server.get("/health").status == 503  # so it was accepted
            assert server.stop() == 0
            assert s.recv(12) == b"HTTP/1.1 503"


SAYS = program("says_what_it_is_told")


def supervise(tmp_path: Path, *arguments: str) -> tuple[int, int]:
    """(exit status of the supervisor, how often its server was started)."""
    lives = tmp_path / "lives"
    command = [sys.executable, "-c", SAYS, str(lives), *arguments]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parent = supervisor.Supervisor(listener, command, 1.0)
        status = parent.run()
    return status, lives.stat().st_size


@pytest.fixture
def no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", (0.0,))
    monkeypatch.setenv("MLX_SAFE_AUTOINSTALL", "0")


@pytest.mark.usefixtures("no_back_off")
def test_a_server_that_worked_may_die_as_often_as_it_likes(tmp_path: Path) -> None:
    assert supervise(tmp_path, "9", "LISTENS", "READY", "WORKED") == (0, 9)


@pytest.mark.usefixtures("no_back_off")
def test_one_that_did_not_is_given_up(tmp_path: Path) -> None:
    assert supervise(tmp_path, "9", "LISTENS", "READY") == (1, 6)


@pytest.mark.usefixtures("no_back_off")
def test_what_ends_servers_in_a_row_is_one_crash_less_when_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many that end it may be tried alone; first deaths count as ever."""
    refused = itertools.cycle([False, True])
    monkeypatch.setattr(holding.Holding, "server_ended", lambda self: next(refused))
    assert supervise(tmp_path, "99", "LISTENS", "READY") == (1, 11)


@pytest.mark.usefixtures("no_back_off")
def test_the_next_server_is_there_at_once_when_one_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", (0.0, 1.0))
    monkeypatch.setattr(holding.Holding, "server_ended", lambda self: True)
    assert supervise(tmp_path, "2", "LISTENS", "READY") == (0, 2)
    assert "starting it again in 0 s" in caplog.text


ENDS_SLOWLY = program("ends_slowly")


@pytest.mark.usefixtures("no_back_off")
def test_a_server_may_take_its_time_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS_SLOWLY, str(tmp_path / "lived")]
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), 60) as client,
    ):
        assert supervisor.Supervisor(listener, command, 30.0).run() == 0
        assert client.recv(6) == b"answer"


class TellsNothing(socket.socket):
    """As on macOS one that was reset."""

    def __init__(
        self,
        family: int = -1,
        type: int = -1,
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        if family == -1:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().__init__(family, type, proto, fileno)


def test_a_connection_that_tells_nothing_of_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the server nor the supervisor may end of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(socket, "socket", TellsNothing)
        with handover.connection_of(os.dup(ours.fileno())) as connection:
            connection.sendall(b"x")
        assert theirs.recv(1) == b"x"


@pytest.mark.usefixtures("no_back_off")
def test_what_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, failures = subprocess.Popen, [OSError(errno.EAGAIN, "no processes")]

    def sometimes(*args: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return start(*args, **more)

    monkeypatch.setattr(subprocess, "Popen", sometimes)
    assert supervise(tmp_path, "2", "LISTENS", "READY") == (0, 2)
    assert "cannot be started: no processes" in caplog.text


@pytest.mark.parametrize("damage", ["emptied", "unknown", "notes"])
def test_a_file_that_nobody_can_read_costs_its_own_client_only(damage: str) -> None:
    """What ended the server may have overwritten what it wrote."""
    kept, clients = holding.Holding(60.0), []
    for key in (1, 2):
        ours, client = socket.socketpair()
        clients.append(client)
        file = RequestFile.make()
        kept.keep(key, [ours.detach(), file.fd])
        if key == 2:
            continue
        if damage == "emptied":
            os.ftruncate(file.fd, 0)
        elif damage == "unknown":
            os.pwrite(file.fd, b"\xff", 0)
        else:
            file.stream(begun.entry([{"not": "an opening"}], b"data"))
    assert not kept.server_ended()
    assert len(kept) == 1
    assert clients[0].recv(1) == b""
    kept.refuse_all(holding.STOPPING)
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("took", "told"), [(None, 5), (0.2, 1), (12.1, 13), (60, 60), (500, 60)]
)
def test_retry_after_is_what_the_last_start_took(took: float | None, told: int) -> None:
    head, body = holding._refusal(took).split(b"\r\n\r\n")
    assert f"Retry-After: {told}\r\n".encode() in head
    assert json.loads(body)["error"]["retry_after"] == told


SLOW_TO_LOAD = program("slow_to_load")


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_a_model_that_takes_long_is_not_waited_for_for_ever(
    tiny_model: Path, seconds: str
) -> None:
    """By a request under a supervisor: the next one finds what the start took."""
    env = {supervisor.BORN_S: "0", supervisor.LAST_START_S: "12.1"}
    more = ("--hold-seconds", seconds)
    with Server(tiny_model, *more, program=SLOW_TO_LOAD, env=env) as server:
        server.wait_listening()
        answer = server.chat()
        assert answer.status == 503
        assert answer.error["code"] == "unavailable"
        assert answer.headers["retry-after"] == "13"
        # Nothing says yet how much the prompt cache may have.
        found = server.get("/status.json").json
        assert found["prompt_cache"]["limit"] <= found["memory"]["ceiling"]


def test_the_channel_takes_records_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handover.send(ours, handover.Message.HOLD, 7, (ours.fileno(), ours.fileno()))
        got = handover.receive(theirs)
        assert got is not None
        message, key, files = got
        assert (message, key, len(files)) == (handover.Message.HOLD, 7, 2)
        for fd in files:
            os.close(fd)
        ours.shutdown(socket.SHUT_WR)
        assert handover.receive(theirs) is None
