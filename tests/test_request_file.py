"""What a server had read of a request when it was killed: no gap, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mlx_safe.server import request_file
from mlx_safe.server.request_file import RequestFile, State
from support.programs import program

READS = program("reads_a_request")
LENGTH = 40_000_000
# A piece that looks like the one before it, and one that does not.
TEXTS = {"the same": b"x" * LENGTH, "noise": random.Random(0).randbytes(LENGTH)}


def connections() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), 60)
        return listener.accept()[0], client


@pytest.mark.skipif(sys.platform != "linux", reason="counts what came in")
@pytest.mark.parametrize("text", TEXTS)
def test_one_server_after_another_is_killed_while_it_reads(text: str) -> None:
    ours, client = connections()
    sent = TEXTS[text]
    file = RequestFile.make()

    def send() -> None:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)

    with ours, client:
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        command = [sys.executable, "-c", READS, str(ours.fileno()), str(file.fd)]
        kills = 0
        while kills < 12:
            child = subprocess.Popen(
                command, pass_fds=(ours.fileno(), file.fd), stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=60)
            kills += 1
            file = RequestFile(file.fd)
            file.settle(ours)
        rest = b""
        ours.settimeout(60)
        while piece := ours.recv(1 << 20):
            rest += piece
        thread.join(60)
        assert file.read() + rest == sent
        file.close()


@pytest.mark.parametrize("was_taken", [False, True])
@pytest.mark.parametrize("tells", [False, True], ids=["compared", "counted"])
def test_of_the_last_piece_is_asked_whether_it_was_taken(
    monkeypatch: pytest.MonkeyPatch, was_taken: bool, tells: bool
) -> None:
    """The server died between the announcement and its end."""
    if not tells:
        monkeypatch.delattr(socket, "TCP_INFO", raising=False)
    ours, client = connections()
    with ours, client:
        client.sendall(b"first")
        file = RequestFile.make()
        buffer = memoryview(bytearray(100))
        assert file.receive(ours, buffer) == 5
        client.sendall(b"second")
        if was_taken:
            monkeypatch.setattr(RequestFile, "_taken", lambda self: None)
        else:
            ours.recv(6, socket.MSG_PEEK)
            os.pwrite(file.fd, b"second", request_file.START + 5)
            file._moving = 6
            file._write_head()
        if was_taken:
            assert file.receive(ours, buffer) == 6
            monkeypatch.undo()
            if not tells:
                monkeypatch.delattr(socket, "TCP_INFO", raising=False)
        client.sendall(b"third")
        client.shutdown(socket.SHUT_WR)
        next_one = RequestFile(file.fd)
        next_one.settle(ours)
        rest = b""
        while piece := ours.recv(100):
            rest += piece
        assert next_one.read() + rest == b"firstsecondthird"
        file.close()


def test_what_had_begun_is_not_settled() -> None:
    ours, client = connections()
    with ours, client:
        file = RequestFile.make()
        file.works(True)
        for deaths in (1, 1):
            file.settle(ours)
            assert (file.state, file.deaths) == (State.READING, deaths)
        file.reach(State.BEGUN)
        file.settle(ours)
        assert RequestFile(file.fd).state is State.BEGUN
        file.close()
