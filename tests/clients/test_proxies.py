"""HAProxy and nginx between a client and two servers."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.cases import CALM, ENDLESS, NO_REPLAY, POSTED, Stage, start_all
from clients.proxy import EXAMPLES, PROXIES, Proxy, program
from support.programs import program as text_of
from support.server import CONTROLLED, Answer, Server, eventually

# A body larger than what HAProxy holds of one by itself, 16 KB.
BODIES = {"short": "", "long": "x" * 60_000}


@pytest.fixture(scope="module")
def two(tiny_model: Path) -> Iterator[list[Server]]:
    """The first can be made to fail, the second is sound."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(Server(tiny_model, *NO_REPLAY, program=CONTROLLED))
            for _ in range(2)
        ]
        for server in servers:
            server.wait_ready()
        yield servers


@pytest.fixture(scope="module", params=PROXIES)
def running(request: pytest.FixtureRequest, two: list[Server]) -> Iterator[Proxy]:
    proxy = Proxy(request.param, two)
    with proxy:
        proxy.wait_ready()
        yield proxy


@pytest.fixture
def proxy(running: Proxy, two: list[Server]) -> Iterator[Proxy]:
    """One of the proxies; afterwards all is as it was."""
    yield running
    two[0].plan(CALM)
    # What failed is asked again after a while.
    assert eventually(lambda: asks_the_first(running, two)), running.log


def asks_the_first(proxy: Proxy, two: list[Server]) -> bool:
    asked = two[0].log.count(POSTED)
    assert proxy.chat(max_tokens=1).status == 200
    if two[0].log.count(POSTED) > asked:
        return True
    time.sleep(0.2)
    return False


def test_a_stream_comes_as_it_is_made(proxy: Proxy, two: list[Server]) -> None:
    """The first token is there while the server waits with the next ones."""
    two[0].hold(6)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 20}
    with proxy.stream({**body, "stream": True}) as lines:
        first = next(line for line in lines if b'"content"' in line)
        two[0].wait_held()
        two[0].go()
        rest = list(lines)
    assert first.startswith(b"data: {")
    assert rest[-2].strip() == b"data: [DONE]"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("size", BODIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_503_goes_to_the_other_server(
    proxy: Proxy, two: list[Server], phase: str, size: str, stream: bool
) -> None:
    """A fault before the first token, in prefill or in the first decode step."""
    asked = [server.log.count(POSTED) for server in two]
    two[0].plan(f"{phase}:1:8")
    answer = proxy.chat(f"{size} {phase}", stream=stream, user=BODIES[size])
    assert answer.status == 200 and not answer.broken
    assert not answer.error and answer.text
    two[1].wait_for_log(POSTED, asked[1] + 1)
    assert [s.log.count(POSTED) - n for s, n in zip(two, asked, strict=True)] == [1, 1]


def test_who_leaves_is_passed_on(proxy: Proxy, two: list[Server]) -> None:
    for stream in (False, True):
        gone = two[0].disconnects
        two[0].hold(20)
        body = {"messages": [{"role": "user", "content": "left"}], "stream": stream}
        with proxy.connected({**body, "max_tokens": ENDLESS}):
            two[0].wait_held()
        two[0].wait_for_log("outcome=client_left", gone + 1)
        two[0].go()


def test_connections_to_the_server_are_kept(proxy: Proxy, two: list[Server]) -> None:
    with contextlib.closing(proxy.connect()) as connection:
        for stream in (False, True):
            said(connection, stream)
        before = two[0].ask("connections")
        for stream in (True, False, True, False):
            said(connection, stream)
        # HAProxy's checks come on their own.
        checks = 5 if proxy.checks else 0
        assert two[0].ask("connections") - before <= checks


def said(connection: http.client.HTTPConnection, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "again"}], "max_tokens": 4}
    text = json.dumps({**body, "stream": stream})
    connection.request("POST", "/v1/chat/completions", text)
    response = connection.getresponse()
    assert response.status == 200
    assert b"choices" in response.read()


# A connection that waits for a request is closed after a second.
HASTY = "from mlx_safe.server import wire\nwire.KEEP_ALIVE_S = 1.0\n" + CONTROLLED


@pytest.fixture
def hasty(tiny_model: Path) -> Iterator[Server]:
    """A server that is to be killed."""
    with Server(tiny_model, *NO_REPLAY, inject=CALM, program=HASTY) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("name", PROXIES)
def test_a_server_that_is_killed(
    name: str, hasty: Server, two: list[Server], stage: Stage
) -> None:
    """A stream of which nothing has come goes to the other, one that is cut looks cut.

    Before that: connections that the server closed while they waited do no harm.
    """
    with Proxy(name, [hasty, two[1]]).wait_ready() as proxy:
        for _ in range(3):
            assert proxy.chat(max_tokens=2).status == 200
            time.sleep(1.2)  # the server has closed it
        clients = {
            n: d
            for n, d in stage.drivers.items()
            if n in ("openai-python", "openai-node")
        }
        start_all(proxy, clients, max_tokens=ENDLESS)
        for driver in clients.values():
            driver.wait_begun()
        answers: list[Answer] = []
        hasty.hold(1)
        hasty.wait_held()
        waiting = threading.Thread(
            target=lambda: answers.append(proxy.chat("waits", stream=True))
        )
        waiting.start()
        hasty.wait_for_clients(len(clients) + 1)
        hasty.process.kill()
        for client, driver in clients.items():
            found = driver.outcome()
            assert found.text and found.told, f"a silent truncation: {client}: {found}"
            assert not found.finish_is_good
        waiting.join(60)
        (answer,) = answers
        assert answer.status == 200 and answer.done and answer.text


def test_checks_leave_nothing_in_the_log(two: list[Server], proxy: Proxy) -> None:
    """HAProxy resets the connections of its checks, some before they are answered."""
    if proxy.checks:
        before = two[1].ask("connections")
        assert eventually(lambda: two[1].ask("connections") >= before + 5)
    for server in two:
        gone = [x for x in server.log.splitlines() if "a client went away" in x]
        assert gone == []
        assert "Traceback" not in server.log


@pytest.mark.parametrize("name", PROXIES)
def test_the_proxy_takes_the_example_as_it_is(name: str, tmp_path: Path) -> None:
    """With its own ports and files, as an operator checks it; without a warning."""
    found = program(name)
    assert found, f"{name} is not installed"
    example = str(EXAMPLES / f"{name}.{'cfg' if name == 'haproxy' else 'conf'}")
    arguments = {
        "haproxy": ["-c", "-dW", "-f", example],
        "nginx": ["-t", "-p", str(tmp_path), "-e", "stderr", "-c", example],
    }
    if name == "nginx":
        arguments[name] += ["-g", f"pid {tmp_path}/pid;"]
    checked = subprocess.run(
        [found, *arguments[name]], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr
    assert not re.search("warn|alert|emerg", checked.stderr, re.I), checked.stderr


@pytest.mark.parametrize("name", PROXIES)
def test_the_example_keeps_a_conversation_at_its_server(
    name: str, two: list[Server]
) -> None:
    two[0].plan(CALM)
    with Proxy(name, two, example=True) as proxy:
        proxy.wait_ready()
        homes = []
        for i in range(12):
            before = [server.log.count(POSTED) for server in two]
            headers = {"X-Conversation": f"conversation {i}"}
            body = {"messages": [{"role": "user", "content": f"turn {i}"}]}
            for _ in range(3):
                answer = proxy.post({**body, "max_tokens": 1}, headers=headers)
                assert answer.status == 200, answer
            new: list[int] = []

            def all_logged(before: list[int] = before, new: list[int] = new) -> bool:
                counts = zip(two, before, strict=True)
                new[:] = [s.log.count(POSTED) - n for s, n in counts]
                return sum(new) == 3

            assert eventually(all_logged), proxy.log
            assert sorted(new) == [0, 3]
            homes.append(new.index(3))
    assert set(homes) == {0, 1}


def talk(proxy: Server, name: str) -> Answer:
    body = {"messages": [{"role": "user", "content": name}], "max_tokens": 2}
    return proxy.post(body, headers={"X-Conversation": name})


def homes(proxy: Server, server: Server) -> dict[bool, str]:
    """A conversation whose home is ``server``, and one whose home it is not."""
    found: dict[bool, str] = {}
    for i in range(32):
        before = server.ask("steps")
        assert talk(proxy, f"conversation {i}").status == 200
        found.setdefault(server.ask("steps") > before, f"conversation {i}")
    return found


@pytest.mark.parametrize("name", PROXIES)
def test_the_example_asks_on_when_each_server_has_failed_once(
    name: str, two: list[Server]
) -> None:
    """nginx leaves both alone then, and answers 502 by itself."""
    for server in two:
        server.plan(CALM)
    with Proxy(name, two, example=True).wait_ready() as proxy:
        home = homes(proxy, two[0])
        for server, of_the_first in zip(two, (True, False), strict=True):
            faults = server.log.count("fault of the GPU")
            server.plan("any:1:8")
            answer = talk(proxy, home[of_the_first])
            assert answer.status == 200, answer
            server.wait_for_log("fault of the GPU", faults + 1)
        assert [talk(proxy, one).status for one in home.values()] == [200, 200]


@pytest.mark.parametrize("name", PROXIES)
def test_the_example_asks_servers_of_which_none_is_ready(
    name: str, tiny_model: Path
) -> None:
    """They hold what comes until they are. By its checks HAProxy has none then."""
    with contextlib.ExitStack() as stack:
        loading = [
            stack.enter_context(Server(tiny_model, program=text_of("loads_when_asked")))
            for _ in range(2)
        ]
        for server in loading:
            server.wait_listening()
        proxy = Proxy(name, loading, example=True)
        stack.enter_context(proxy)
        proxy.wait_listening()
        if proxy.checks:
            proxy.wait_for_log("is DOWN", 2)
        answers: list[Answer] = []
        waits = threading.Thread(target=lambda: answers.append(talk(proxy, "early")))
        waits.start()
        waits.join(1.0)
        for server in loading:
            server.tell("load")
        waits.join(60)
        assert [answer.status for answer in answers] == [200], answers


class Unwell(http.server.ThreadingHTTPServer):
    """A server whose /health is 503, from when it is asked something; ``go`` ends that.

    Attributes:
        refuses: what it is asked is a 503, after ``go``.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.port = self.server_port
        self.refuses = False
        self.others: list[Unwell] = []
        self.asked, self.go = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Checks of HAProxy end with a reset."""


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Unwell

    def do_GET(self) -> None:
        is_unwell = any(server.asked.is_set() for server in self.server.others)
        self.answer(503 if is_unwell else 200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        if self.server.refuses:
            self.server.go.wait(60)
        self.answer(503 if self.server.refuses else 200)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("name", PROXIES)
def test_the_example_asks_the_other_when_none_is_ready_any_more(name: str) -> None:
    """HAProxy answers such a request itself, or (2.6) not at all."""
    with Unwell() as one, Unwell() as two:
        one.others = two.others = [one, two]
        upstreams: Any = [one, two]
        with Proxy(name, upstreams, example=True).wait_ready() as proxy:
            one.refuses = two.refuses = True
            answers: list[Answer] = []
            waits = threading.Thread(target=lambda: answers.append(talk(proxy, "a")))
            waits.start()
            assert eventually(lambda: one.asked.is_set() or two.asked.is_set())
            home, other = (one, two) if one.asked.is_set() else (two, one)
            if name == "haproxy":
                proxy.wait_for_log("is DOWN", 2)
            other.refuses = False
            home.go.set()
            waits.join(60)
            assert [answer.status for answer in answers] == [200], answers
        for server in (one, two):
            server.shutdown()
