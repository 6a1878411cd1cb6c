"""`mlx_safe.asgi.protect`, with Starlette and uvicorn as they are."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlx_safe import asgi, epoch, testing
from support import asgi_app, child
from support.programs import program, with_suite

SUITE = Path(__file__).parent


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    raised: BaseException | None
    has_ended: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def asked(app: Any, path: str, **more: Any) -> Answer:
    """One GET of ``path``, as a server makes it."""
    where, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": where,
        "raw_path": where.encode(),
        "query_string": query.encode(),
        "headers": [],
        **more,
    }
    sent: list[Any] = []

    received = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if not received:
            await asyncio.sleep(300)
        return received.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    raised = None
    try:
        await app(scope, receive, send)
    except Exception as e:
        raised = e
    start, *parts = sent
    assert [p["type"] for p in parts] == ["http.response.body"] * len(parts)
    if raised is None:
        assert [p.get("more_body", False) for p in parts][-1] is False
        assert not any(not p.get("more_body", False) for p in parts[:-1])
    return Answer(
        start["status"],
        {k.decode(): v.decode() for k, v in start["headers"]},
        b"".join(p.get("body", b"") for p in parts),
        raised,
        bool(parts) and not parts[-1].get("more_body", False),
    )


@pytest.fixture(params=[False, True], ids=["plain", "middleware"])
def app(request: pytest.FixtureRequest) -> Any:
    return asgi.protect(asgi_app.make(request.param), health="/health")


def ask(app: Any, path: str, **more: Any) -> Answer:
    return asyncio.run(asked(app, path, **more))


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/raises", 503, "metal_out_of_memory"),
        ("/raises?code=2", 503, "metal_timeout"),
        ("/raises?code=9", 500, "internal_generation_error"),
        ("/wraps", 503, "metal_out_of_memory"),
        ("/memory", 503, "insufficient_memory"),
        ("/quotes", 503, "metal_out_of_memory"),
        ("/quotes?status=507", 503, "metal_out_of_memory"),
        ("/hides", 503, "metal_timeout"),
        pytest.param(
            *("/of_a_group", 503, "metal_out_of_memory"),
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11), reason="Python 3.10 has no groups"
            ),
        ),
    ],
)
def test_a_fault_has_the_contracts_answer(
    app: Any, path: str, status: int, code: str
) -> None:
    answer = ask(app, path)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert answer.headers.get("retry-after") == ("5" if status == 503 else None)
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.raised is None


def test_what_was_answered_is_counted() -> None:
    app = asgi.protect(asgi_app.make(), metrics="/metrics")
    before = epoch()

    async def all_of_them() -> Answer:
        for path in ("/raises", "/raises", "/raises?code=2", "/fails_later", "/own"):
            await asked(app, path)
        await asked(app, "/hides")
        return await asked(app, "/metrics")

    answer = asyncio.run(all_of_them())
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    assert f"mlx_safe_faults_total {before + 1}" in lines
    assert "mlx_safe_requests_open 0" in lines
    answers = "mlx_safe_fault_answers_total"
    assert f'{answers}{{code="metal_out_of_memory"}} 3' in lines
    assert f'{answers}{{code="metal_timeout"}} 2' in lines


def test_below_v1_messages_it_is_anthropics(app: Any) -> None:
    answer = ask(app, "/v1/messages")
    assert answer.status == 503
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "overloaded_error"


def test_what_is_no_fault_stays_as_it_is(app: Any) -> None:
    answer = ask(app, "/own")
    assert (answer.status, answer.json) == (500, {"detail": "mine"})
    assert answer.headers["x-mine"] == "1"
    answer = ask(app, "/own?raise=1")
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    assert isinstance(answer.raised, ValueError)  # the server logs it
    # A status that says something else is not taken for the fault of another request.
    answer = ask(app, "/hides?status=501")
    assert (answer.status, answer.body) == (501, b"it failed")
    assert ask(app, "/nothing").status == 404


@pytest.mark.parametrize("how", ["raise", "quote"])
def test_a_stream_that_fails_says_so_and_ends(app: Any, how: str) -> None:
    answer = ask(app, f"/fails_later?how={how}")
    assert answer.status == 200
    events = answer.body.decode().split("\n\n")
    assert events[:2] == ["data: one", "data: two"]
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["code"] == "metal_out_of_memory"
    assert answer.raised is None


def test_a_stream_that_says_so_itself_is_left_alone(app: Any) -> None:
    body = ask(app, "/fails_later?how=done").body
    assert body.count(b"[DONE]") == 1
    assert b"metal_out_of_memory" not in body
    assert ask(app, "/fails_later?how=well").body == b"data: one\n\ndata: two\n\n"


@pytest.mark.parametrize("kind", ["Text/Event-Stream; charset=utf-8"])
def test_a_stream_is_known_however_it_is_written(app: Any, kind: str) -> None:
    assert ask(app, f"/fails_later?type={kind}").body.endswith(b"data: [DONE]\n\n")


def test_an_end_with_other_line_ends_is_one(app: Any) -> None:
    body = ask(app, "/fails_later?how=crlf").body
    assert body.endswith(b"data:[DONE]\r\n\r\n")
    assert b"metal_out_of_memory" not in body


def test_an_answer_about_faults_is_no_fault(app: Any) -> None:
    assert b"metal_out_of_memory" not in ask(app, "/fails_later?how=answer").body
    assert b"metal_out_of_memory" in ask(app, "/fails_later?how=failed").body


@pytest.mark.parametrize("query", ["type=text/plain", "encoding=gzip"])
def test_what_cannot_be_added_to_is_cut(app: Any, query: str) -> None:
    """Nor has it an end, which Starlette's middleware would have sent before."""
    answer = ask(app, f"/fails_later?{query}")
    assert answer.body == b"data: one\n\ndata: two\n\n"
    assert answer.raised is not None
    assert not answer.has_ended


def test_an_answer_in_parts_has_its_end(app: Any) -> None:
    answer = ask(app, "/parts")
    assert (answer.body, answer.has_ended) == (b"one two", True)


def test_a_head_has_no_body(app: Any) -> None:
    answer = ask(app, "/raises", method="HEAD")
    assert (answer.status, answer.body) == (503, b"")
    assert int(answer.headers["content-length"]) > 0
    health = ask(app, "/health", method="HEAD")
    assert (health.status, health.body) == (200, b"")


def test_what_was_not_asked_of_health_is_the_applications(app: Any) -> None:
    assert ask(app, "/health", method="POST").status == 404


def test_where_it_is_mounted_makes_no_difference(app: Any) -> None:
    # As uvicorn (--root-path) and Starlette (Mount) have it.
    mounted = {"root_path": "/api"}
    assert ask(app, "/api/health", **mounted).json == {"status": "ok"}
    answer = ask(app, "/api/v1/messages", **mounted)
    assert answer.json["type"] == "error"


def test_a_route_below_v1_messages_is_no_other() -> None:
    assert "code" in ask(asgi.protect(fails), "/v1/messages_of_mine").json["error"]
    assert ask(asgi.protect(fails), "/sub/v1/messages/count").json["type"] == "error"


async def nothing_comes() -> Any:
    await asyncio.sleep(300)


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError(asgi_app.OUT_OF_MEMORY)


def test_headers_that_are_not_of_the_body_stay(app: Any) -> None:
    """A browser reads nothing without those of CORS."""

    async def allows(scope: Any, receive: Any, send: Any) -> None:
        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"access-control-allow-origin", b"*"))
            await send(message)

        await asgi_app.make()(scope, receive, send_more)

    answer = ask(asgi.protect(allows), "/quotes")
    assert answer.status == 503
    assert answer.headers["access-control-allow-origin"] == "*"
    assert int(answer.headers["content-length"]) == len(answer.body)


def test_twice_protected_is_answered_and_counted_once() -> None:
    inner = asgi.protect(asgi_app.make(), health="/health")
    outer = asgi.protect(inner, metrics="/metrics")

    async def both() -> tuple[Answer, Answer, Answer]:
        return (
            await asked(outer, "/raises"),
            await asked(outer, "/health"),
            await asked(outer, "/metrics"),
        )

    failed, health, metrics = asyncio.run(both())
    assert (failed.status, health.status) == (503, 200)
    assert b'{code="metal_out_of_memory"} 1' in metrics.body


def test_it_can_be_a_middleware() -> None:
    app = asgi_app.make()
    app.add_middleware(asgi.ProtectedApp, health="/health")
    assert ask(app, "/raises").status == 503
    assert ask(app, "/health").json == {"status": "ok"}


def test_trailers_are_passed_on() -> None:
    async def trails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.trailers", "headers": []})

    async def types() -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        scope = {"type": "http", "method": "GET", "path": "/"}
        await asgi.protect(trails)(scope, nothing_comes, send)
        return sent

    assert asyncio.run(types())[-1] == "http.response.trailers"


def test_what_is_held_reaches_a_slow_client_whole() -> None:
    """The application ends while its 500 is on the way."""

    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        await asgi_app.make()(scope, receive, send)
        await asyncio.sleep(0.3)

    async def sent_slowly() -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            await asyncio.sleep(0.5)
            sent.append(message["type"])

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/own",
            "headers": [],
            "query_string": b"",
            "raw_path": b"/own",
        }
        await asgi.protect(slowly)(scope, nothing_comes, send)
        return sent

    assert asyncio.run(sent_slowly()) == ["http.response.start", "http.response.body"]


def test_an_exception_that_is_answered_is_in_the_log(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def mine(scope: Any, receive: Any, send: Any) -> None:
        testing.record_fault(2)  # somebody else's, it may be
        raise ValueError("my own mistake")

    assert ask(asgi.protect(mine), "/").status == 503
    assert "my own mistake" in caplog.text
    ask(app, "/raises")
    assert "/raises: answered with metal_out_of_memory" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"app": None}, "needs an ASGI application, not None"),
        ({"health": "health"}, "health must begin with a slash, not 'health'"),
        ({"metrics": ""}, "metrics must begin with a slash, not ''"),
    ],
)
def test_a_mistake_is_told_at_once(words: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        asgi.protect(**{"app": fails, **words})


def test_who_goes_on_to_build_the_application_is_told_how() -> None:
    with pytest.raises(AttributeError, match="complete the application first"):
        asgi.protect(fails).get("/path")  # type: ignore[attr-defined]


def test_a_background_task_runs_and_nobody_waits_for_it(app: Any) -> None:
    asgi_app.events.clear()
    assert ask(app, "/background").json == {"ok": True}
    assert asgi_app.events == ["background began", "background ended"]


def test_a_client_that_leaves_ends_the_application(app: Any) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(asked(app, "/waits"))
        while "waits" not in asgi_app.events:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asgi_app.events[-1] == "cancelled"

    asgi_app.events.clear()
    asyncio.run(asyncio.wait_for(leave(), 60))


def test_the_lifespan_passes_by(app: Any) -> None:
    async def live() -> list[str]:
        wanted = ["lifespan.startup", "lifespan.shutdown"]
        sent: list[str] = []

        async def receive() -> Any:
            return {"type": wanted.pop(0)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        return sent

    assert asyncio.run(live()) == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_health(app: Any) -> None:
    assert ask(app, "/health").json == {"status": "ok"}


def test_faults_of_before_are_nobodys() -> None:
    testing.record_fault(8)
    before = epoch()
    answer = ask(asgi.protect(asgi_app.make()), "/own")
    assert (answer.status, epoch()) == (500, before)


def test_an_application_that_serves_no_more_ends_no_process() -> None:
    done = child.run(program("application_that_is_done"), PYTHONPATH=with_suite())
    assert (done.returncode, done.stdout) == (0, "lives 1\n"), done.stderr


# -- a process that must be replaced -------------------------------------------------


class Served(NamedTuple):
    port: int
    process: subprocess.Popen[str]

    def get(self, path: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        headers = {k.lower(): v for k, v in response.getheaders()}
        return Answer(response.status, headers, body, None)


@pytest.fixture
def served() -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "support.asgi_app", str(listener.fileno())],
            cwd=SUITE,
            pass_fds=(listener.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Served(listener.getsockname()[1], process)
        finally:
            process.kill()
            process.communicate(timeout=60)


def test_all_who_wait_are_answered_before_the_process_leaves(served: Served) -> None:
    answers: dict[str, Answer] = {}

    def get(path: str) -> None:
        answers[path] = served.get(path)

    paths = ["/waits", "/streams", "/in_a_thread"]
    assert served.get("/health").status == 200
    threads = [threading.Thread(target=get, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    # They are answered only when the process is lost.
    threads[0].join(1.0)
    assert not answers
    dead = served.get("/dies")
    for thread in threads:
        thread.join(120)
    for answer in (dead, answers["/waits"], answers["/in_a_thread"]):
        assert answer.status == 503
        assert answer.json["error"]["code"] == "metal_out_of_memory"
        assert answer.headers["retry-after"] == "5"
    stream = answers["/streams"]
    assert stream.status == 200
    assert stream.body.startswith(b"data: one\n\n")
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert served.process.wait(120) == 75


@pytest.mark.parametrize("how", ["raise", "quote", "planned"])
def test_a_lost_gpu_ends_the_process_with_75(served: Served, how: str) -> None:
    """Nothing has counted it: the GPU is asked."""
    answer = served.get(f"/loses?how={how}")
    assert answer.status == 503
    assert answer.json["error"]["code"] == "cuda_device_lost"
    assert served.process.wait(120) == 75


def test_so_it_does_where_a_stream_tells_of_it_itself(served: Served) -> None:
    answer = served.get("/loses?how=event")
    assert answer.body.count(b"[DONE]") == 1
    assert served.process.wait(120) == 75


def test_a_websocket_that_fails_is_closed_with_what_to_do(served: Served) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    url = f"ws://127.0.0.1:{served.port}/socket_fails"
    with connect(url) as websocket:
        websocket.send("leaves")
    with connect(url) as websocket:
        websocket.send("fails")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
    served.process.terminate()
    log = served.process.communicate(timeout=60)[1]
    assert "Unexpected ASGI message" not in log


@pytest.mark.parametrize("how", ["/loses", "/dies"])
def test_a_websocket_works_and_is_closed_when_the_process_is_lost(
    served: Served, how: str
) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{served.port}/echo") as websocket:
        websocket.send("hello")
        assert websocket.recv(timeout=60) == "hello"
        assert served.get(how).status == 503
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    assert served.process.wait(120) == 75
