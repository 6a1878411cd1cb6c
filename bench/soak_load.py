"""The load of the soak: what clients do to a server, right, wrong, slow and rude.

Every client draws what it does next from a seed of its own. What it was told is a
`Told`; whether that was right is decided here, by what an undisturbed server said.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.bad_requests import cases
from support.server import REQUEST_TIMEOUT_S, Answer, Server

CHAT = "/v1/chat/completions"
# What an answer may be but 200; anything else is a fault of the server.
REFUSALS = {400, 404, 408, 411, 413, 431, 503}
# Not tried again: a step that fails by no fault of the GPU's (the plan's action "bug"),
# and a fault that means corrupted memory (9 to 0xb, 0x10, 0x11).
BUG = (500, "internal_generation_error")
WORDS = ("ship", "sail", "wind", "rope", "deck", "mast", "tide", "port", "keel", "buoy")
LARGE = 8 * 2**20
HEADERS = 400
BAD = cases()


@dataclass
class Told:
    """What all clients were told, counted. Thread-safe by `add`.

    Attributes:
        outcomes: (what was asked, what came) and how often.
        wrong: one line for each answer that should not have come.
        statuses: of the completions that were read to their end, for `/metrics`.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, asked: str, came: str, wrong: str | None = None) -> None:
        with self._lock:
            self.outcomes[asked, came] += 1
            if wrong is not None:
                self.wrong.append(f"{asked}: {came}: {wrong}")

    def status(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1


def prompts(seed: int, count: int) -> list[dict[str, Any]]:
    """Bodies of chats with greedy answers, short and long, batched and sequential."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        words = draw.choice((1, 5, 20, 120))
        text = " ".join([str(number), *draw.choices(WORDS, k=words)])
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": draw.choice((1, 4, 16, 48)),
            "logit_bias": {"0": -100, "2": -100},
        }
        # With a seed mlx-lm answers on its sequential path.
        found.append({**body, "seed": 1} if number % 4 == 0 else body)
    return found


class Client:
    """One client, that does one thing after another until it is told to stop.

    Args:
        texts: the prompts, and what an undisturbed server answers to each.
        may_be_cut: whether the server is killed meanwhile, which cuts whole answers. A
            stream goes on in the next process, on Linux whatever the moment was.
        pause: seconds between two deeds, on average.
    """

    def __init__(
        self,
        server: Server,
        seed: str,
        texts: list[tuple[dict[str, Any], str]],
        told: Told,
        *,
        may_be_cut: bool,
        pause: float = 0.0,
    ) -> None:
        self._server = server
        self._draw = random.Random(seed)
        self._texts = texts
        self._told = told
        self._may_be_cut = may_be_cut
        self._pause = pause
        self._deeds: list[tuple[int, Callable[[], None]]] = [
            (12, self.chat),
            (3, self.leave),
            (3, self.malformed),
            (1, self.slow_body),
            (1, self.large_body),
            (1, self.header_flood),
            (1, self.stranger),
        ]

    def deed(self) -> None:
        """Does one thing, drawn by its weight."""
        weights, deeds = zip(*self._deeds, strict=True)
        self._draw.choices(deeds, weights)[0]()
        time.sleep(self._draw.uniform(0, 2 * self._pause))

    # -- what is right -------------------------------------------------------------

    def chat(self) -> None:
        body, expected = self._draw.choice(self._texts)
        stream = self._draw.random() < 0.5
        kind = "stream" if stream else "chat"
        answer = self._server.post({**body, "stream": stream})
        self._judge(kind, answer, expected, stream)

    def _judge(
        self, kind: str, answer: Answer, expected: str | None, stream: bool
    ) -> None:
        goes_on = stream and sys.platform == "linux"
        may_be_cut = self._may_be_cut and not goes_on
        if answer.broken or answer.status is None:
            self._told.add(kind, "cut", None if may_be_cut else answer.broken)
            return
        self._told.status(answer.status)
        error = self._error(answer)
        if answer.status != 200:
            known = answer.status in REFUSALS or (answer.status, error) == BUG
            wrong = None if known and error else answer.body[:200]
            self._told.add(kind, f"{answer.status} {error}", wrong)
        elif error:
            self._told.add(kind, f"an error event, {error}")
        elif stream and not answer.done:
            wrong = None if may_be_cut else "a stream without an end"
            self._told.add(kind, "cut", wrong)
        elif expected is not None and answer.text != expected:
            self._told.add(kind, "200", f"{answer.text!r}, not {expected!r}")
        else:
            self._told.add(kind, "200")

    def _error(self, answer: Answer) -> str | None:
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            error = answer.error
            return None if error is None else str(error.get("code") or error["type"])
        return None

    # -- what is wrong -------------------------------------------------------------

    def malformed(self) -> None:
        case = self._draw.choice(BAD)
        answer = self._server.post(case.also(max_tokens=1), case.path)
        expected = {400} if case.refused else {200, 400}
        # One that may be answered may meet a fault.
        if answer.status in (None, 503) or (answer.status == 500 and not case.refused):
            self._judge("malformed", answer, None, stream=False)
            return
        self._told.status(answer.status)
        wrong = None if answer.status in expected else f"{case.id}: {answer.body[:200]}"
        self._told.add("malformed", str(answer.status), wrong)

    def leave(self) -> None:
        """Goes before the answer is whole, in good order or with a RST."""
        body, _ = self._draw.choice(self._texts)
        raw = json.dumps({**body, "max_tokens": 200, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        with self._connected("leave") as s:
            s.sendall(head.encode() + raw)
            s.settimeout(self._draw.choice((0.0001, 0.05, 0.3)))
            with contextlib.suppress(TimeoutError):
                s.recv(1 << 16)
            if self._draw.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._told.add("leave", "left")

    # -- what is odd ---------------------------------------------------------------

    def slow_body(self) -> None:
        body, expected = self._draw.choice(self._texts)
        raw = json.dumps(body).encode()
        pieces = 5
        size = len(raw) // pieces + 1
        self._raw(
            "slow body",
            [raw[i : i + size] for i in range(0, len(raw), size)],
            expected,
            wait_s=0.1,
        )

    def large_body(self) -> None:
        body, _ = self._draw.choice(self._texts)
        self._raw("large body", [json.dumps({**body, "user": "x" * LARGE}).encode()])

    def header_flood(self) -> None:
        body, _ = self._draw.choice(self._texts)
        headers = {f"X-{i}": "y" * 100 for i in range(HEADERS)}
        self._raw("header flood", [json.dumps(body).encode()], headers=headers)

    def stranger(self) -> None:
        """Says what is no HTTP, or nothing, and goes."""
        with self._connected("stranger") as s:
            s.sendall(self._draw.choice((b"", b"\x16\x03\x01", b"GET / \r\n", b"POST")))
            self._told.add("stranger", "left")

    def _raw(
        self,
        kind: str,
        pieces: list[bytes],
        expected: str | None = None,
        *,
        wait_s: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        answer = Answer(None)
        with contextlib.closing(
            http.client.HTTPConnection(
                "127.0.0.1", self._server.port, timeout=REQUEST_TIMEOUT_S
            )
        ) as connection:
            try:
                connection.putrequest("POST", CHAT)
                connection.putheader("Content-Length", str(sum(map(len, pieces))))
                for name, value in (headers or {}).items():
                    connection.putheader(name, value)
                connection.endheaders()
                for piece in pieces:
                    connection.send(piece)
                    time.sleep(wait_s)
                response = connection.getresponse()
                answer.status = response.status
                answer.body = response.read().decode()
            except (OSError, http.client.HTTPException) as e:
                answer.broken = f"{type(e).__name__}: {e}"
        # Who refuses without reading may close while there is more to come.
        if answer.broken and kind != "slow body":
            self._told.add(kind, "refused by closing")
            return
        self._judge(kind, answer, expected, stream=False)

    @contextlib.contextmanager
    def _connected(self, kind: str) -> Any:
        try:
            with socket.create_connection(
                ("127.0.0.1", self._server.port), REQUEST_TIMEOUT_S
            ) as s:
                yield s
        except OSError as e:
            wrong = None if self._may_be_cut else f"{type(e).__name__}: {e}"
            self._told.add(kind, "cut", wrong)


class Crowd:
    """Clients that run side by side, and stop together. Use as a context manager."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients = clients
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(c,), daemon=True) for c in clients
        ]
        self.failed: list[BaseException] = []

    def _run(self, client: Client) -> None:
        while not self._stop.is_set():
            try:
                client.deed()
            except BaseException as e:  # what the soak itself did wrong
                self.failed.append(e)
                return

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * REQUEST_TIMEOUT_S)
        assert not any(t.is_alive() for t in self._threads), "a client has no answer"
