"""Servers in child processes, and small clients for them.

Every wait has a limit, everything listens on loopback, and a child is ended by
its pid.
"""

from __future__ import annotations

import codecs
import contextlib
import http.client
import io
import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import warm
from support.programs import program

# The Python of the servers: another one than the tests' own under `make machrun`.
PYTHON = os.environ.get("MLX_SAFE_TEST_PYTHON", sys.executable)
START_TIMEOUT_S = float(os.environ.get("MLX_SAFE_TEST_START_S", "120"))
REQUEST_TIMEOUT_S = 90.0

STOCK = program("stock_server")


NEVER = 10**9  # a step that no test comes to

CONTROLLED = program("controlled_server")

# The protected server, which after too many faults refuses for an hour. SIGUSR1: the
# hour has passed.
REFUSING = program("refuses_for_an_hour")

# mlx-lm looks for new requests when a batch has run for half a second.
BATCH_RUNS_S = 0.6


def kept_in(directory: Path | str) -> tuple[str, ...]:
    """Flags of KV caches on disk, however full the disk of this machine is."""
    return ("--kv-dir", str(directory), "--kv-free-bytes", "0")


# Of the ports given out last: nobody else who asks here is given them.
_reserved: deque[contextlib.ExitStack] = deque()
RESERVED_MAX = 16


def free_port(count: int = 1) -> int:
    """The first of ``count`` ports in a row that nobody has.

    From below the range that systems give to outgoing connections: a server listens
    seconds later, and another suite's clients connect meanwhile. Until then their
    numbers stay taken for datagrams, which keeps other suites from choosing them.
    """
    for _ in range(100):
        port = random.randrange(10_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as kept:
            try:
                for i in range(port, port + count):
                    reserved = socket.socket(type=socket.SOCK_DGRAM)
                    kept.enter_context(reserved).bind(("127.0.0.1", i))
                    tried = stack.enter_context(socket.socket())
                    tried.bind(("127.0.0.1", i))
            except OSError:
                continue
            _reserved.append(kept.pop_all())
        while len(_reserved) > RESERVED_MAX:
            _reserved.popleft().close()
        return port
    raise AssertionError(f"no {count} free ports in a row")


@dataclass
class Answer:
    """What a client saw. ``events`` are the data lines of a stream, parsed."""

    status: int | None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    events: list[Any] = field(default_factory=list)
    broken: str | None = None

    def with_events(self) -> Answer:
        """Itself, with the events that are in its body."""
        lines = [x for x in self.body.splitlines() if x.startswith("data: {")]
        self.events = [json.loads(line[len("data: ") :]) for line in lines]
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error object, wherever the answer carries it; None without."""
        if self.events:
            return next((e["error"] for e in self.events if "error" in e), None)
        return self.json.get("error") if self.body else None

    @property
    def text(self) -> str:
        """The text of a completed answer, streamed or not."""
        if self.events:
            parts = [e["choices"][0] for e in self.events if e.get("choices")]
            return "".join(
                p.get("text") or p.get("delta", {}).get("content") or "" for p in parts
            )
        choice = self.json["choices"][0]
        text: str = choice.get("text") or choice["message"]["content"]
        return text

    @property
    def done(self) -> bool:
        return self.body.rstrip().endswith("data: [DONE]")


def eventually(condition: Callable[[], bool], timeout: float = 60.0) -> bool:
    """Whether ``condition`` becomes true: an answer is sent before it is stored."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Server:
    """One server in a child process; use as a context manager."""

    def __init__(
        self,
        model: Path | str,
        *arguments: str,
        inject: str = "",
        stock: bool = False,
        env: dict[str, str] | None = None,
        program: str | None = None,
        tls: ssl.SSLContext | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.tls = tls
        self.headers = headers or {}  # of every request
        self.model = Path(model)
        self.port = free_port()
        command = [PYTHON]
        program = STOCK if stock else program
        command += ["-c", program] if program else ["-m", "mlx_safe", "serve"]
        command += ["--model", str(model), "--port", str(self.port), *arguments]
        environment = dict(os.environ, MLX_SAFE_INJECT=inject, HF_HUB_OFFLINE="1")
        environment["MLX_SAFE_AUTOINSTALL"] = "0" if stock else "1"
        environment.update(env or {})
        self.start(command, environment)

    def start(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Starts the child, and reads what it says."""
        self._lines: list[str] = []
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder("utf-8")("replace"), translate=True
        )
        self._rest = ""  # of a line that has no end yet
        self._reading = threading.Lock()
        self._is_read = False  # to its end
        self.process = warm.start(command, os.environ if env is None else env)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._is_read:
            self._take(timeout=1.0)

    def _take(self, timeout: float = 0.0) -> bool:
        """Takes what is new in the output; whether there was anything. Any thread."""
        assert self.process.stdout is not None
        end = self.process.stdout.fileno() if not self._is_read else -1
        if end < 0 or not select.select([end], [], [], timeout)[0]:
            return False
        with self._reading:
            # Another thread may have taken it.
            if self._is_read or not select.select([end], [], [], 0)[0]:
                return not self._is_read
            data = os.read(end, 1 << 16)
            text = self._rest + self._decoder.decode(data, final=not data)
            *lines, self._rest = text.split("\n")
            self._lines += [line + "\n" for line in lines]
            if not data:
                self._lines += [self._rest] if self._rest else []
                self._is_read = True
            return True

    def plan(self, text: str) -> None:
        """Plans faults in a server that runs `CONTROLLED`."""
        self._tell(text, "planned: ")

    def ask(self, what: str) -> int:
        """One of the figures of a server that runs `CONTROLLED`."""
        return int(self._tell(what, f"{what}: "))

    def hold(self, step: int) -> None:
        """Lets a server that runs `CONTROLLED` wait in the step so many from now."""
        self._tell(f"hold {step}", "holds: ")

    def wait_held(self, seconds: float = 0.0) -> None:
        """Waits until it does, and so much longer."""
        assert eventually(lambda: self.ask("hold") == 0), self.log
        time.sleep(seconds)

    def go(self) -> None:
        """Ends the wait; the server may end at once, so nothing is asked of it."""
        self.tell("go")

    def wait_for_clients(self, count: int) -> None:
        """Waits until the requests of so many are in the generator's hands.

        They may be in its queue still; `wait_for_requests` are those it has taken.
        """
        assert eventually(lambda: self.ask("clients") >= count), self.log

    def _tell(self, line: str, receipt: str) -> str:
        """Writes a line to the server; what it answers after ``receipt``."""
        seen = len(self._lines)
        self.tell(line)
        deadline = time.monotonic() + 60
        while True:
            for answer in self._lines[seen:]:
                if receipt in answer:
                    return answer.split(receipt)[1]
            assert time.monotonic() < deadline, self.log
            time.sleep(0.002)

    def tell(self, line: str) -> None:
        """Writes a line to the server's standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples, of those with these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").body.splitlines()
            if line.startswith(name) and all(pair in line for pair in wanted)
        )

    def is_well(self) -> bool:
        """What /health says; its figures besides are of the moment."""
        answer = self.get("/health")
        status = {True: 200, False: 503}[answer.json["status"] == "ok"]
        assert answer.status == status
        return answer.status == 200

    def wait_for_requests(self, count: int) -> None:
        """Waits until so many requests have been taken."""

        def taken() -> float:
            return self.metric("mlx_safe_requests_in_flight") - self.metric(
                'mlx_safe_requests_in_state{state="queued"}'
            )

        assert eventually(lambda: taken() >= count), self.log

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Waits for a line, which comes on a way of its own: after an answer, say."""
        assert eventually(lambda: self.log.count(text) >= times), self.log

    @property
    def disconnects(self) -> int:
        """How many clients the log says went away before they had their answer."""
        return self.log.count("outcome=client_left")

    def children(self) -> list[int]:
        """The servers that a supervisor runs, as ps has them: macOS has no /proc."""
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid="]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [map(int, line.split()) for line in listed.stdout.splitlines()]
        return [child for child, parent in rows if parent == self.process.pid]

    @property
    def log(self) -> str:
        """What it has said until now, or what since `renew`.

        All of it: what a server logs before it answers is in the log for whoever has
        the answer.
        """
        while self._take():
            pass
        return "".join(self._lines)

    def renew(self) -> Server:
        """Nothing is planned, cached or logged: for tests that share `CONTROLLED`."""
        self.plan(f"any:{NEVER}")
        # When this is answered, what was before is done with. It is counted and logged
        # when the answer has been sent.
        answer = self.chat("another", max_tokens=1)
        assert answer.status == 200, self.log
        name = answer.json["id"]

        def is_logged() -> bool:
            return any(name in x and "outcome" in x for x in self.log.splitlines())

        assert eventually(is_logged), self.log
        self.ask("forget")
        self._lines.clear()
        return self

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> int:
        """Ends the child if it still runs; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        status = self.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def wait(self, timeout: float = 60.0) -> int:
        """Waits for the child to end by itself; its exit status."""
        status = self.process.wait(timeout)
        self._reader.join(60)
        assert not self._reader.is_alive(), "somebody still has the server's output"
        return status

    def wait_ready(self) -> Server:
        """Waits until it serves, and returns it; one that does not is ended."""
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            with contextlib.suppress(OSError, AssertionError):
                # A client that gave up early would be a line in the log.
                assert self.get("/health", START_TIMEOUT_S).status == 200
                return
            time.sleep(0.05)
        raise AssertionError(f"not ready in {START_TIMEOUT_S} s:\n{self.log}")

    def wait_listening(self) -> None:
        """Waits until the port answers, whatever it says."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.02)
        raise AssertionError(f"nothing listens:\n{self.log}")

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        address = ("127.0.0.1", self.port)
        if self.tls is None:
            return http.client.HTTPConnection(*address, timeout=timeout)
        return http.client.HTTPSConnection(*address, timeout=timeout, context=self.tls)

    def connect(self, timeout: float = REQUEST_TIMEOUT_S) -> http.client.HTTPConnection:
        """A connection on which nothing has been sent."""
        connection = self._connect(timeout)
        connection.connect()
        return connection

    def get(
        self,
        path: str,
        timeout: float = REQUEST_TIMEOUT_S,
        headers: dict[str, str] | None = None,
        method: str = "GET",
    ) -> Answer:
        more = self.headers if headers is None else headers
        with contextlib.closing(self._connect(timeout)) as connection:
            connection.request(method, path, headers=more)
            response = connection.getresponse()
            headers = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, headers, response.read().decode())

    def post(
        self,
        body: Any,
        path: str = "/v1/chat/completions",
        timeout: float = REQUEST_TIMEOUT_S,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Sends a request; a broken or hanging answer is noted, not raised."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = Answer(None)
        lines = []
        with contextlib.closing(self._connect(timeout)) as connection:
            try:
                more = self.headers if headers is None else headers
                connection.request("POST", path, raw, headers=more)
                response = connection.getresponse()
                answer.status = response.status
                answer.headers = {k.lower(): v for k, v in response.getheaders()}
                # Not line by line: so http.client does not tell a stream that is cut.
                lines.append(response.read())
            except http.client.IncompleteRead as e:
                lines.append(e.partial)
                answer.broken = f"cut: {e}"
            except (OSError, http.client.HTTPException) as e:
                answer.broken = f"{type(e).__name__}: {e}"
        answer.body = b"".join(lines).decode()
        return answer.with_events()

    @contextlib.contextmanager
    def stream(self, body: Any) -> Iterator[Iterator[bytes]]:
        """The lines of a chat's answer, as they come."""
        with contextlib.closing(self._connect(REQUEST_TIMEOUT_S)) as connection:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), headers=self.headers
            )
            with connection.getresponse() as response:
                yield iter(response)

    @contextlib.contextmanager
    def connected(self, body: Any, reset: bool = False) -> Iterator[socket.socket]:
        """A plain socket that has sent a chat; at the end its client goes.

        Args:
            reset: it ends the connection with a RST.
        """
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(raw)}"
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, REQUEST_TIMEOUT_S) as s:
            s.sendall(head.encode() + b"\r\n\r\n" + raw)
            yield s
            if reset:
                linger = struct.pack("ii", 1, 0)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def chat(self, text: str = "hello there", /, **more: Any) -> Answer:
        """Asks; ``more`` are fields of the body, or ``text`` and ``timeout`` (s)."""
        text = more.pop("text", text)
        timeout = more.pop("timeout", REQUEST_TIMEOUT_S)
        messages = [{"role": "user", "content": text}]
        return self.post(
            {"messages": messages, "max_tokens": 8, **more}, timeout=timeout
        )

    @contextlib.contextmanager
    def chatting(self, count: int, **more: Any) -> Iterator[list[Answer]]:
        """``count`` chats at once, each with a text of its own.

        The list is filled, in the order of the texts, when the block has ended.
        """
        found: dict[int, Answer] = {}
        answers: list[Answer] = []

        def one(i: int) -> None:
            found[i] = self.chat(f"hello from client {i}", **more)

        threads = [
            threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)
        ]
        for t in threads:
            t.start()
        yield answers
        for t in threads:
            t.join(2 * REQUEST_TIMEOUT_S)
        assert len(found) == count, f"a client waits for ever:\n{self.log}"
        answers += [found[i] for i in range(count)]

    def chats(self, count: int, **more: Any) -> list[Answer]:
        """The answers of `chatting`."""
        with self.chatting(count, **more) as answers:
            pass
        return answers
