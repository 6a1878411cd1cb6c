"""A stream goes on in the next server process, as if nothing had been.

What a client gets must be, byte for byte, what it gets of a server that nobody kills;
but for the answer's id and its time, which must be the same in all of its events.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import Server

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
        self, server: Server, body: Any, path: str = CHAT, version: str = "1.1"
    ) -> None:
        raw = json.dumps({"stream": True, **body}).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(raw)}"
        self.socket = socket.create_connection(("127.0.0.1", server.port), 90)
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
        """The events without what each answer has of its own, which is checked."""
        events = self.events
        assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
        for event in events:
            del event["id"], event["created"]
            for choice in event["choices"]:
                for call in choice.get("delta", {}).get("tool_calls", ()):
                    del call["id"]
            if event.get("usage"):  # the prompt is in the cache, or not
                event["usage"].pop("prompt_tokens_details", None)
        return events

    def close(self) -> None:
        self.socket.close()


def kill(server: Server) -> None:
    (child,) = server.children()
    os.kill(child, signal.SIGKILL)


def undisturbed(server: Server, body: Any, path: str = CHAT) -> Stream:
    server.wait_ready()
    with contextlib.closing(Stream(server, body, path)) as stream:
        assert stream.read().is_whole
    return stream


def killed(
    server: Server, body: Any, path: str = CHAT, after: tuple[int, ...] = (4,)
) -> Stream:
    """A stream whose server is killed when so many of its events have come."""
    server.wait_ready()
    with contextlib.closing(Stream(server, body, path)) as stream:
        for count in after:
            stream.read_events(count)
            assert not stream.is_whole, stream.body
            kill(server)
        stream.read()
    return stream


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=SLOW) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def real(real_model: Path) -> Iterator[Server]:
    with Server(real_model, program=SLOW) as server:
        yield server.wait_ready()


def chat(text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 30, **more}


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, chat()),
    "seed": (CHAT, chat(seed=5, temperature=1.0)),
    "text": (TEXT, {"prompt": "hello", "max_tokens": 30}),
    "n": (CHAT, chat(n=2, seed=3, temperature=1.0)),
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
