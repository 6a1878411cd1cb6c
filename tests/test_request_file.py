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

from mlx_safe.server import begun, request_file
from mlx_safe.server.handover import Handover, Held
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


# -- a stream ------------------------------------------------------------------------

OPENING = ("chatcmpl-1", "model", 7, True)


def streaming(connection: socket.socket, *pieces: bytes) -> RequestFile:
    """The file of a stream of which so many pieces are sent, and one more is to be."""
    connection.sendall(b"an earlier answer")
    file = RequestFile.make()
    file.add(b"request")
    held = Held(Handover(None), 1, RequestFile(file.fd))
    held.streams(connection, *OPENING)
    for piece in pieces:
        held.note([0, 5, "text", None, None, None, None])
        held.sends(piece)
        connection.sendall(piece)
        held.has_sent(piece)
    held.works("a choice", True)
    held.note([0])
    held.sends(b"the last")
    return RequestFile(file.fd)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what was sent")
@pytest.mark.parametrize("count", [0, 3, 8])
def test_a_piece_of_a_stream_was_sent_or_not_or_in_part(count: int) -> None:
    ours, client = connections()
    with ours, client:
        file = streaming(ours, b"first", b"second")
        ours.sendall(b"the last"[:count])
        for deaths in (1, 1):  # the next server may die before it goes on
            file = RequestFile(file.fd)
            file.settle(ours)
            assert (file.state, file.deaths) == (State.STREAMS, deaths)
        found, rest = file.begun()
        assert rest == b"the last"[count:]
        assert (found.id, found.model, found.created, found.is_chunked) == OPENING
        assert [said.token for said in found.tokens(0)] == [5, 5]
        assert found.has_ended(0)
        assert file.read() == b"request"
        file.close()


@pytest.mark.parametrize("was_sent", [False, True])
def test_where_the_system_does_not_say_each_piece_is_marked(
    monkeypatch: pytest.MonkeyPatch, was_sent: bool
) -> None:
    monkeypatch.delattr(socket, "TCP_INFO", raising=False)
    ours, client = connections()
    with ours, client:
        file = streaming(ours, b"first", b"second")
        if was_sent:
            file.mark_sent(len(b"firstsecondthe last"))
        file.settle(ours)
        assert file.state is (State.STREAMS if was_sent else State.BEGUN)
        file.close()


def test_an_entry_that_was_cut_short_was_not_sent() -> None:
    ours, client = connections()
    with ours, client:
        file = streaming(ours, b"first")
        os.ftruncate(file.fd, os.fstat(file.fd).st_size - 1)
        file.settle(ours)
        found, rest = file.begun()
        assert (found.output, rest) == (b"first", b"")
        assert not found.has_ended(0)
        # What the next one writes follows what is whole.
        held = Held(Handover(None), 1, RequestFile(file.fd))
        assert held.begun is not None
        held.sends(b"another")
        assert RequestFile(file.fd).begun()[0].output == b"firstanother"
        held.next(b"")
        assert RequestFile(file.fd).state is State.READING
        file.close()


@pytest.mark.parametrize("sent_before", [0, 2])
def test_a_stream_goes_on_with_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, sent_before: int
) -> None:
    """With this server alone."""
    file = RequestFile.make()
    held = Held(Handover(None), 1, RequestFile(file.fd))
    ours, client = connections()
    with ours, client:
        held.streams(ours, *OPENING)
        for _ in range(sent_before):
            held.sends(b"piece")
        write = os.pwrite

        def full(fd: int, data: bytes, at: int) -> int:
            if at >= request_file.START:
                raise OSError("no space left")
            return write(fd, data, at)

        monkeypatch.setattr(os, "pwrite", full)
        for _ in range(2):
            held.sends(b"piece")
            assert RequestFile(file.fd).state is State.BEGUN
        file.close()


def test_another_answer_is_no_stream() -> None:
    """One that was asked for, and is refused before it begins."""
    file = RequestFile.make()
    held = Held(Handover(None), 1, RequestFile(file.fd))
    ours, client = connections()
    with ours, client:
        held.streams(ours, *OPENING)
        held.streams_not()
        held.sends(b"503")
        assert RequestFile(file.fd).state is State.BEGUN
        file.close()


def test_there_is_no_stream_without_an_entry() -> None:
    with pytest.raises(ValueError, match="no whole entry"):
        begun.Begun(begun.entry([{}], b"x")[:-1])


def test_a_stream_that_is_too_long_to_be_kept_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one answer would fill the memory."""
    monkeypatch.setattr(request_file, "STREAM_MAX", 2000)
    ours, client = connections()
    file = RequestFile.make()
    with ours, client:
        held = Held(Handover(None), 1, file)
        held.streams(ours, "id", "model", 1, True)
        sizes = []
        for _ in range(100):
            held.sends(b"x" * 200)
            sizes.append(os.fstat(file.fd).st_size)
        assert file.state is State.BEGUN
        assert 1000 < max(sizes) <= 2000 and sizes[-1] < 200
    file.close()
