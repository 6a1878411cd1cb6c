"""`mlx_safe.asgi.protect` where applications and clients are not as one would think."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from mlx_safe import asgi, testing
from support import child
from support.asgi_app import OUT_OF_MEMORY
from support.programs import program, with_suite
from test_asgi import Answer, ask, nothing_comes

EVENTS = b"text/event-stream"


def sends(
    status: int,
    parts: Sequence[bytes],
    *,
    then: BaseException | None = None,
    more: bool = False,
    **headers: str,
) -> Any:
    """An application that answers so; ``more``: it says that there is more to come."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        fields = [
            (k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()
        ]
        start = {"type": "http.response.start", "status": status, "headers": fields}
        await send(start)
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if not more:
            await send({"type": "http.response.body", "body": b""})
        if then is not None:
            raise then

    return app


def streams(
    *parts: bytes, then: BaseException | None = None, more: bool = False
) -> Any:
    return sends(200, parts, then=then, more=more, content_type=EVENTS.decode())


def answer_of(app: Any) -> Answer:
    return ask(asgi.protect(app), "/")


QUOTED = json.dumps({"error": {"message": OUT_OF_MEMORY}}).encode()


@pytest.mark.parametrize(
    "ping", [b": ping\n\n", b": ping - now\r\n\r\n", b":\n\n:\n\n"]
)
def test_pings_after_the_error_do_not_hide_it(ping: bytes) -> None:
    answer = answer_of(streams(b"data: one\n\n", b"data: " + QUOTED + b"\n\n", ping))
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert b"metal_out_of_memory" in answer.body


@pytest.mark.parametrize(
    "end",
    [
        b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
        b'event: response.completed\ndata: {"type": "response.completed"}\n\n',
        b"data: [DONE]\n\n",
    ],
)
def test_a_whole_stream_stays_as_it_is_when_what_comes_after_it_fails(
    end: bytes,
) -> None:
    """A background task, say, that Starlette runs before the application ends."""
    answer = answer_of(streams(b"data: one\n\n", end, then=RuntimeError(OUT_OF_MEMORY)))
    assert answer.body == b"data: one\n\n" + end


def test_a_line_that_begins_like_an_end_is_none() -> None:
    failed = RuntimeError(OUT_OF_MEMORY)
    answer = answer_of(streams(b"data: [DONE] soon\n\n", then=failed, more=True))
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"metal_out_of_memory" in answer.body


def test_a_compressed_5xx_is_read() -> None:
    body = gzip.compress(QUOTED)
    answer = answer_of(sends(500, [body], content_encoding="gzip", vary="Accept"))
    assert (answer.status, answer.headers["vary"]) == (503, "Accept")
    assert "content-encoding" not in answer.headers
    assert answer.json["error"]["code"] == "metal_out_of_memory"
    # One that is not what it says stays as it is.
    assert answer_of(sends(500, [b"mine"], content_encoding="gzip")).body == b"mine"


def test_a_fault_whose_text_alone_was_raised_is_answered() -> None:
    """Engines hand over a text from their thread, and the handler raises its own."""

    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError(f"engine: {OUT_OF_MEMORY}")

    answer = answer_of(raises)
    assert answer.json["error"]["code"] == "metal_out_of_memory"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no groups")
def test_of_several_faults_one_that_is_fatal_counts() -> None:
    from mlx_safe.asgi.messages import answerable

    texts = [OUT_OF_MEMORY, testing.metal_message(4)]
    group = BaseExceptionGroup("tasks", [RuntimeError(t) for t in texts])  # type: ignore[name-defined]  # noqa: F821
    found = answerable(group)
    assert getattr(found, "code", None) == 4


def test_where_it_is_mounted_may_end_with_a_slash() -> None:
    app = asgi.protect(sends(404, []), health="/health")
    assert ask(app, "/health", root_path="/").status == 200
    assert ask(app, "/api/health", root_path="/api/").status == 200


def test_trailers_come_after_an_end_that_was_held() -> None:
    async def trails(scope: Any, receive: Any, send: Any) -> None:
        await streams(b"data: one\n\n")(scope, receive, send)
        await send({"type": "http.response.trailers", "headers": []})

    sent = asyncio.run(messages(trails))
    assert [m["type"].rpartition(".")[2] for m in sent][-2:] == ["body", "trailers"]
    assert not sent[-2].get("more_body", False)


async def messages(app: Any, **scope: Any) -> list[Any]:
    """All that ``app``, under protection, sends for a request of this scope."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {"type": "http", "method": "GET", "path": "/", "headers": [], **scope}
    await asgi.protect(app)(asked, receive, send)
    return sent


def test_a_5xx_that_its_application_does_not_end_reaches_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for its client, which waits for it."""
    monkeypatch.setattr("mlx_safe.asgi.exchange.UNENDED_S", 0.0)

    async def sent() -> list[str]:
        sent: list[str] = []
        has_come = asyncio.Event()

        async def waits(scope: Any, receive: Any, send: Any) -> None:
            start = {"type": "http.response.start", "status": 503, "headers": []}
            await send(start)
            body = {"type": "http.response.body", "body": b"one", "more_body": True}
            await send(body)
            await has_come.wait()
            await send({**body, "body": b"two", "more_body": False})

        async def send(message: Any) -> None:
            sent.append(message.get("body", b"start").decode())
            await asyncio.sleep(0)
            if sent[-1] == "one":
                has_come.set()

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        asked = asgi.protect(waits)(scope, nothing_comes, send)
        await asyncio.wait_for(asked, 60)
        return sent

    assert asyncio.run(sent()) == ["start", "one", "two"]


def test_what_follows_a_5xx_that_is_let_go_stays_behind_it() -> None:
    """Its trailers, say, while it is on the way to a slow client."""

    async def trails(scope: Any, receive: Any, send: Any) -> None:
        await sends(500, [b"x" * 1000])(scope, receive, send)
        await is_sent.wait()
        await send({"type": "http.response.trailers", "headers": []})

    async def sent() -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            is_sent.set()
            await asyncio.sleep(0.2)
            sent.append(message["type"].rpartition(".")[2])

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await asgi.protect(trails)(scope, nothing_comes, send)
        return sent

    is_sent = asyncio.Event()
    assert asyncio.run(sent()) == ["start", "body", "body", "trailers"]


def middlewares(*words: str) -> Any:
    """An application whose stream of text fails behind these, the last outermost."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    def fails(after: int) -> Any:
        async def parts() -> Any:
            for _ in range(after):
                yield "part\n" * 100
            raise RuntimeError(OUT_OF_MEMORY)

        async def stream(request: Any) -> Any:
            return StreamingResponse(parts(), media_type="text/plain")

        return stream

    async def passes(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    made = {
        "base": Middleware(BaseHTTPMiddleware, passes),
        "gzip": Middleware(GZipMiddleware),
    }
    return Starlette(
        routes=[Route(f"/{n}", fails(n)) for n in (0, 1, 2)],
        middleware=[made[word] for word in reversed(words)],
    )


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("words", [(), ("base",), ("gzip",), ("base", "gzip")])
def test_a_stream_that_fails_looks_whole_to_nobody(
    words: tuple[str, ...], after: int
) -> None:
    """Behind whatever middleware, and before its first part, too."""
    headers = [(b"accept-encoding", b"gzip")]
    app = asgi.protect(middlewares(*words))
    answer = ask(app, f"/{after}", headers=headers)
    assert answer.status == 503 or not answer.has_ended
    assert answer.status == 200 or answer.json["error"]["code"]


async def fails_before_it_accepts(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise RuntimeError(OUT_OF_MEMORY)


def test_a_websocket_that_fails_before_it_is_accepted_has_the_answer() -> None:
    """A close would be a 403, which says that another try is useless."""
    can: dict[str, Any] = {"extensions": {"websocket.http.response": {}}}
    start, body = asyncio.run(
        messages(fails_before_it_accepts, type="websocket", **can)
    )
    assert start["type"] == "websocket.http.response.start"
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"5")
    assert json.loads(body["body"])["error"]["code"] == "metal_out_of_memory"
    sent = asyncio.run(messages(fails_before_it_accepts, type="websocket"))
    assert [m["type"] for m in sent] == ["websocket.close"]


def test_a_websocket_that_was_refused_is_not_closed_as_well() -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        start = {"status": 401, "headers": []}
        await send({"type": "websocket.http.response.start", **start})
        await send({"type": "websocket.http.response.body", "body": b"no"})
        raise RuntimeError(OUT_OF_MEMORY)

    async def types() -> list[str]:
        sent: list[str] = []

        async def send(message: Any) -> None:
            sent.append(message["type"].rpartition(".")[2])

        scope = {"type": "websocket", "path": "/", "headers": []}
        with pytest.raises(RuntimeError):
            await asgi.protect(refuses)(scope, None, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(types()) == ["start", "body"]


# -- a process that must be replaced -------------------------------------------------


@pytest.mark.parametrize("how", ["counted", "raised"])
def test_all_applications_of_a_process_answer_before_it_leaves(how: str) -> None:
    code = program("answers_for_all_applications")
    done = child.run(code, PYTHONPATH=with_suite(), HOW=how)
    assert (done.returncode, done.stdout) == (75, "second 503 True\n"), done.stderr


def test_a_clients_words_end_no_process() -> None:
    """Not even those that are MLX's own, word for word: the GPU works."""
    done = child.run(program("only_quotes_what_is_fatal"), PYTHONPATH=with_suite())
    said = "503 True\n" * 4 + "200 True\n200\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_a_fatal_fault_of_before_the_first_request_ends_the_process_too() -> None:
    done = child.run(program("raises_what_was_before"), PYTHONPATH=with_suite())
    assert (done.returncode, done.stdout) == (75, "503\n"), done.stderr
