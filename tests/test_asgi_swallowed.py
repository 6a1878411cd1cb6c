"""Servers that swallow a fault, and others, under `mlx_safe.asgi.protect`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import mlx.core as mx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import mlx_safe
from mlx_safe import asgi, testing
from mlx_safe._failures import FaultWatch
from test_asgi import Answer, ask, asked

FAILED = testing.metal_message(8)


def swallows() -> None:
    """As fusion-mlx's steps after the first of a turn (0.10, ``_step_burst``)."""
    with contextlib.suppress(RuntimeError):
        testing.record_fault(8)
        raise RuntimeError(FAILED)


def guards() -> None:
    with contextlib.suppress(mlx_safe.MetalError), mlx_safe.guard():
        testing.record_fault(8)


def guards_and_raises() -> None:
    with contextlib.suppress(mlx_safe.MetalError), mlx_safe.guard():
        testing.record_fault(8)
        raise RuntimeError(FAILED)


def retries() -> None:
    calls: list[int] = []

    def function() -> mx.array:
        calls.append(1)
        if len(calls) == 1:
            testing.record_fault(8)
        return mx.zeros(1)

    mlx_safe.retry(function)


def replays() -> None:
    """As `mlx_safe.mlx_lm` does after a fault."""
    watch = FaultWatch()
    testing.record_fault(8)
    watch.settle()


async def plain(request: Request) -> Response:
    request.app.state.fails()
    return JSONResponse({"text": "garbage"}, headers={"x-mine": "1"})


async def refuses(request: Request) -> Response:
    request.app.state.fails()
    return JSONResponse({"text": "no"}, 404)


async def stream(request: Request) -> Response:
    kind = request.query_params.get("type", "text/event-stream")

    async def parts() -> AsyncIterator[str]:
        yield "data: one\n\n"
        request.app.state.fails()
        yield "data: garbage\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(parts(), media_type=kind)


async def tells(request: Request) -> Response:
    """A stream that tells of it, after what was computed before."""

    async def parts() -> AsyncIterator[str]:
        testing.record_fault(8)
        yield f"data: {json.dumps({'error': {'message': 'it failed'}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(parts(), media_type="text/event-stream")


async def waits(request: Request) -> Response:
    """Another's answer, which the fault has not touched."""
    request.app.state.waiting.set()
    await request.app.state.failed.wait()
    return JSONResponse({"text": "right"})


async def raises(request: Request) -> Response:
    testing.record_fault(8)
    request.app.state.failed.set()
    await asyncio.sleep(0.2)
    raise RuntimeError("the engine failed")


async def leaves(request: Request) -> Response:
    """Its client has left, so its server tells nobody."""
    testing.record_fault(8)
    request.app.state.failed.set()
    await asyncio.sleep(0.2)
    raise asyncio.CancelledError


def make(fails: Callable[[], None] = swallows) -> Any:
    routes = [plain, refuses, stream, tells, waits, raises, leaves]
    app = Starlette(routes=[Route(f"/{r.__name__}", r) for r in routes])
    app.state.fails = fails
    return asgi.protect(app)


def test_a_plain_answer_after_a_swallowed_fault_is_none() -> None:
    answer = ask(make(), "/plain")
    assert (answer.status, answer.json["error"]["code"]) == (503, "metal_out_of_memory")
    assert (answer.headers["retry-after"], answer.headers["x-mine"]) == ("5", "1")


def test_a_stream_ends_with_the_error_where_the_fault_was() -> None:
    one, error, done = ask(make(), "/stream").body.decode().strip().split("\n\n")
    assert (one, done) == ("data: one", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == (
        "metal_out_of_memory"
    )


def test_what_cannot_have_an_error_is_cut() -> None:
    answer = ask(make(), "/stream?type=text/plain")
    assert (answer.body, answer.has_ended) == (b"data: one\n\n", False)
    assert isinstance(answer.raised, mlx_safe.MetalError)


@pytest.mark.parametrize("how", [guards, guards_and_raises, retries, replays])
def test_who_knows_of_a_fault_may_answer(how: Callable[[], None]) -> None:
    assert ask(make(how), "/plain").json == {"text": "garbage"}
    assert ask(make(how), "/stream").body.endswith(b"garbage\n\ndata: [DONE]\n\n")


def test_a_refusal_is_no_answer_that_could_be_wrong() -> None:
    assert (ask(make(), "/refuses").status, ask(make(), "/refuses").raised) == (
        404,
        None,
    )


def test_a_fault_of_before_is_nobodys() -> None:
    testing.record_fault(8)
    assert ask(make(lambda: None), "/plain").status == 200


def test_a_stream_that_tells_of_it_is_left_alone() -> None:
    answer = ask(make(), "/tells")
    assert answer.body.count(b"error") == 1
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("who", ["raises", "leaves"])
def test_when_another_has_failed_the_rest_is_right(who: str) -> None:
    async def both() -> Answer:
        app = make()
        state = app.app.state
        state.waiting, state.failed = asyncio.Event(), asyncio.Event()
        other = asyncio.ensure_future(asked(app, "/waits"))
        await state.waiting.wait()
        with contextlib.suppress(asyncio.CancelledError, ValueError):
            await asked(app, f"/{who}")
        return await other

    assert asyncio.run(both()).json == {"text": "right"}
