"""A stream goes on in the next server process, as if nothing had been.

What a client gets must be, byte for byte, what it gets of a server that nobody kills.
Only the answer's id and its time may differ, and are the same in all of its events.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.scripted_model import bias
from support.server import Server, eventually

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
# The steps take 10 ms more, so that all are killed in the midst of an answer. What is
# killed in one stream again and again is no suspect here.
SLOW = "from mlx_safe.server import holding\nholding.DEATHS_MAX = 100\n"
SLOW += f"PROGRAM = {program('slow_steps')!r}\n{program('supervises_a_text')}"


class Stream:
    """A stream as it comes, read by a client of HTTP/1.1 that believes nothing.

    Attributes:
        body: of the answer, without the chunks. is_whole: it came to its end.
        head: of the answer; what follows it: of nothing else.
    """

    def __init__(
        self,
        server: Server,
        body: Any,
        path: str = CHAT,
        version: str = "1.1",
        receives: int | None = None,
    ) -> None:
        raw = json.dumps({"stream": True, **body}).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(raw)}"
        self.socket = socket.socket()
        if receives is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        self.socket.settimeout(90)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(head.encode() + b"\r\n\r\n" + raw)
        self._got = b""
        self.body = b""
        self.is_whole = False
        self.head = self._take_line(b"\r\n\r\n").decode()
        self._is_chunked = "chunked" in self.head

    def _more(self) -> bool:
        with contextlib.suppress(ConnectionError):
            data = self.socket.recv(1 << 16)
            self._got += data
            return bool(data)
        return False

    def _take_line(self, end: bytes) -> bytes:
        while end not in self._got:
            if not self._more():
                raise EOFError
        line, _, self._got = self._got.partition(end)
        return line

    def read(self, until: Callable[[], bool] = lambda: False) -> Stream:
        """Reads until it ends, or ``until`` says so after a chunk."""
        with contextlib.suppress(EOFError):
            while not until():
                self._read_chunk()
                if self.is_whole:
                    break
        return self

    def _read_chunk(self) -> None:
        if not self._is_chunked:
            self.is_whole = not self._more() and self.body.endswith(b"[DONE]\n\n")
            if not self.is_whole and not self._got:
                raise EOFError
            self.body, self._got = self.body + self._got, b""
            return
        size = int(self._take_line(b"\r\n"), 16)
        while len(self._got) < size + 2:
            if not self._more():
                raise EOFError
        self.body += self._got[:size]
        assert self._got[size : size + 2] == b"\r\n"
        self._got = self._got[size + 2 :]
        self.is_whole = size == 0

    def read_events(self, count: int) -> Stream:
        return self.read(lambda: self.body.count(b"data: {") >= count)

    @property
    def events(self) -> list[Any]:
        """The events, whose ends are whole."""
        lines = self.body.split(b"\n\n")
        return [json.loads(x[len(b"data: ") :]) for x in lines if x[:7] == b"data: {"]

    @property
    def said(self) -> list[Any]:
        """The events without what each answer has of its own, which is checked.

        Those of a choice are together: whose turn it is first is a matter of time.
        """
        events = self.events
        assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
        for event in events:
            del event["id"], event["created"]
            for choice in event["choices"]:
                # The prompt is read in other pieces.
                for entry in (choice["logprobs"] or {}).get("content", ()):
                    for one in (entry, *entry["top_logprobs"]):
                        del one["logprob"]
                for call in choice.get("delta", {}).get("tool_calls", ()):
                    del call["id"]
            if event.get("usage"):  # the prompt is in the cache, or not
                event["usage"].pop("prompt_tokens_details", None)
        return sorted(events, key=lambda e: [c["index"] for c in e["choices"]] or [9])

    def close(self) -> None:
        self.socket.close()


def kill(server: Server) -> None:
    assert eventually(lambda: bool(server.children()))  # it may wait for a while
    (child,) = server.children()
    ended = server.log.count("ended by SIGKILL")
    os.kill(child, signal.SIGKILL)
    server.wait_for_log("ended by SIGKILL", ended + 1)


def undisturbed(server: Server, body: Any, path: str = CHAT) -> Stream:
    server.wait_ready()
    with contextlib.closing(Stream(server, body, path)) as stream:
        assert stream.read().is_whole
    return stream


def killed(
    server: Server, body: Any, path: str = CHAT, after: tuple[int, ...] = (4,)
) -> Stream:
    """A stream whose server is killed when so many more of its events have come.

    0: as soon as it listens.
    """
    listens = server.wait_ready().log.count("the server listens")
    with contextlib.closing(Stream(server, body, path)) as stream:
        for count in after:
            if count:
                stream.read_events(stream.body.count(b"data: {") + count)
                assert not stream.is_whole, stream.body
            else:
                server.wait_for_log("the server listens", listens + 1)
            listens = server.log.count("the server listens")
            kill(server)
        stream.read()
    return stream


def chat(text: str = "hello there", /, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 100, **more}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=SLOW) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def drafted(tiny_model: Path, draft_model: Path) -> Iterator[Server]:
    more = ("--draft-model", str(draft_model), "--num-draft-tokens", "2")
    with Server(tiny_model, *more, program=SLOW) as server:
        yield server.wait_ready()


SEED = {"seed": 5, "temperature": 1.0}
TWO = {"stop": ["qqq", "zzz"], "n": 2, **SEED}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, chat()),
    "seed": (CHAT, chat(**SEED)),
    "text": (TEXT, {"prompt": "hello", "max_tokens": 100}),
    "n": (CHAT, chat(**TWO)),
    "texts": (TEXT, {"prompt": "hello", "max_tokens": 100, **TWO}),
    "usage": (CHAT, chat(stream_options={"include_usage": True})),
    "penalties": (CHAT, chat(repetition_penalty=1.3, presence_penalty=0.5)),
    "logprobs": (CHAT, chat(logprobs=True, top_logprobs=2)),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_stream_goes_on_in_the_next_process(server: Server, kind: str) -> None:
    path, body = ASKED[kind]
    expected = undisturbed(server, body, path)
    got = killed(server, body, path)
    assert got.is_whole, got.body
    assert got.said == expected.said
    server.wait_for_log(f"id={got.events[0]['id']} method=POST")
    line = next(x for x in server.log.splitlines()[::-1] if "method=POST" in x)
    assert "tokens=" in line
    assert "first_token_s=" not in line, "an earlier process has sent it"


@pytest.mark.parametrize("after", [(1, 8), (4, 0, 3), (2, 2, 0, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "n"])
def test_it_may_be_killed_again_and_again(
    server: Server, kind: str, after: tuple[int, ...]
) -> None:
    path, body = ASKED[kind]
    expected = undisturbed(server, body, path)
    got = killed(server, body, path, after)
    assert got.is_whole, got.body
    assert got.said == expected.said


@pytest.mark.parametrize("seed", [{}, SEED], ids=["greedy", "seed"])
def test_with_a_draft_model(drafted: Server, seed: dict[str, Any]) -> None:
    body = chat(**seed)
    expected = undisturbed(drafted, body)
    got = killed(drafted, body)
    assert got.is_whole, got.body
    assert got.said == expected.said


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize("seed", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_thought_speech_and_call(scripted_model: Path, seed: dict[str, Any]) -> None:
    """Killed at any of its events; its characters are cut in two by tokens."""
    with Server(scripted_model, program=SLOW) as server:
        wanted = {"tools": [TOOL], "logit_bias": bias(scripted_model, call=True)}
        body = chat("Count my birds.", **wanted, **seed) | {"max_tokens": 40}
        expected = undisturbed(server, body)
        count = len(expected.events)
        assert "tool_calls" in expected.body.decode()
        for after in range(1, count, 4):
            got = killed(server, body, after=(after,))
            assert got.is_whole, got.body
            assert got.said == expected.said, after


def test_a_real_model(real_model: Path) -> None:
    """With a stop word, which the text has at last, and what is no English."""
    with Server(real_model, program=SLOW) as server:
        body = chat("Repeat exactly: «Zürich, naïve café, 東京, 🙂🙃» and then END.")
        body |= {"max_tokens": 40, "stop": ["END"]}
        expected = undisturbed(server, body)
        for after in (1, 9):
            got = killed(server, body, after=(after,))
            assert got.is_whole, got.body
            assert got.said == expected.said, after


def test_without_a_seed_it_goes_on_from_what_was_sent(server: Server) -> None:
    server.wait_ready()
    usage = {"stream_options": {"include_usage": True}}
    stream = Stream(server, chat(temperature=1.0, **usage))
    with contextlib.closing(stream):
        stream.read_events(6)
        sent = stream.body
        kill(server)
        stream.read()
    assert stream.is_whole
    assert stream.body.startswith(sent)
    *_, last, usage_event = stream.said
    assert last["choices"][0]["finish_reason"] in ("length", "stop")
    assert usage_event["usage"]["completion_tokens"] <= 100


def test_the_connection_is_kept(server: Server) -> None:
    server.wait_ready()
    with contextlib.closing(Stream(server, chat())) as stream:
        stream.read_events(3)
        kill(server)
        assert stream.read().is_whole
        assert "\r\nKeep-Alive: " in stream.head
        stream.socket.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert stream.socket.recv(12) == b"HTTP/1.1 200"


def test_to_a_client_of_http_1_0(server: Server) -> None:
    expected = undisturbed(server, chat())
    with contextlib.closing(Stream(server, chat(), version="1.0")) as stream:
        stream.read_events(3)
        kill(server)
        stream.read()
    assert stream.is_whole
    assert stream.said == expected.said


def test_nothing_is_made_for_who_has_left(server: Server) -> None:
    server.wait_ready()
    with contextlib.closing(Stream(server, chat() | {"max_tokens": 100_000})) as stream:
        stream.read_events(3)
        kill(server)
    assert server.chat().status == 200
    assert eventually(lambda: server.metric("mlx_safe_requests_in_flight") == 0)


MADE = "mlx_safe_generated_tokens_total"


def has_made(server: Server, count: float) -> bool:
    return server.metric(MADE) >= count


# What clients that do not read leave in the server's hands is soon all that fits.
NARROW = program("has_narrow_sockets")


def test_who_reads_slowly_gets_all_of_it(tiny_model: Path) -> None:
    """The server dies while it sends: there is room for a part of a piece, or none."""
    body = chat(logprobs=True, top_logprobs=11) | {"max_tokens": 100}
    with Server(tiny_model, program=NARROW + SLOW) as server:
        expected = undisturbed(server, body)
        for _ in range(3):
            server.wait_ready()
            made = server.metric(MADE)
            with contextlib.closing(Stream(server, body, receives=2048)) as stream:
                assert eventually(partial(has_made, server, made + 90))
                kill(server)
                stream.read()
            assert stream.is_whole
            assert stream.said == expected.said


COUNTS_NOTHING = "import socket\nvars(socket).pop('TCP_INFO', None)\n"


def test_where_the_system_does_not_count(tiny_model: Path) -> None:
    """As on macOS. An event that is just being sent is not sent twice: it is cut."""
    inner = COUNTS_NOTHING + program("slow_steps")
    outer = COUNTS_NOTHING + program("supervises_a_text")
    with Server(tiny_model, program=f"PROGRAM = {inner!r}\n{outer}") as server:
        expected = undisturbed(server, chat())
        got = [killed(server, chat(), after=(n,)) for n in (2, 4, 6)]
        for stream in got:
            assert stream.said == expected.said[: len(stream.events)]
        assert any(stream.is_whole for stream in got)


def test_over_a_fatal_fault(tiny_model: Path) -> None:
    """The server leaves its begun streams to the next one, as it does the others."""
    body = chat() | {"max_tokens": 30}
    with Server(tiny_model, "--supervise") as server:
        expected = undisturbed(server, body)
    with Server(tiny_model, "--supervise", inject="decode:20:4") as server:
        with contextlib.closing(Stream(server.wait_ready(), body)) as stream:
            stream.read()
        assert "ended with status 75" in server.log
        assert "outcome=handed_over" in server.log
    assert stream.is_whole
    assert stream.said == expected.said


ONCE = f"PROGRAM = {program('serves_once')!r}\n{program('supervises_a_text')}"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("ends", ["late", "stopped"])
def test_one_that_nobody_goes_on_with_ends_with_an_error(
    tiny_model: Path, tmp_path: Path, ends: str, version: str
) -> None:
    env = {"LIVED": str(tmp_path / "lived")}
    hold = ("--hold-seconds", "1" if ends == "late" else "60")
    with Server(tiny_model, *hold, program=ONCE, env=env) as server:
        server.wait_ready()
        stream = Stream(server, chat() | {"max_tokens": 100_000}, version=version)
        with contextlib.closing(stream):
            stream.read_events(3)
            kill(server)
            if ends == "stopped":
                server.process.send_signal(signal.SIGTERM)
            stream.read()
    assert stream.is_whole, stream.body
    assert stream.body.endswith(b"data: [DONE]\n\n")
    *events, last = stream.events
    assert last["object"] == "error"
    assert last["id"] == events[0]["id"]
    assert last["error"]["code"] == "unavailable"
    said = {"late": "The server is starting.", "stopped": "The server is stopping."}
    assert last["error"]["message"] == said[ends]
    # No server has a line of it.
    line = next(x for x in server.log.splitlines() if "is answered here" in x)
    assert said[ends] in line and f"id={last['id']}" in line
