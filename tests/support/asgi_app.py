"""An application as servers of MLX are: its routes fail in each way that they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import mlx.core as mx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from mlx_safe import testing

OUT_OF_MEMORY = testing.metal_message(8)
events: list[str] = []


async def raises(request: Request) -> JSONResponse:
    """An exception of MLX gets out of the handler."""
    raise RuntimeError(testing.metal_message(int(request.query_params.get("code", 8))))


async def loses(request: Request) -> Response:
    """The GPU fails for good, and nothing counts it, as with CUDA."""
    lost = "cudaStreamSynchronize(s) failed: unspecified launch failure"
    how = request.query_params.get("how", "raise")
    if how == "planned":
        testing.inject("any", code=719, action="cuda")
        testing.step("decode")

    def fails(*_: object) -> NoReturn:
        raise RuntimeError(lost)

    module: Any = mx
    module.array = fails
    if how == "event":
        event = f"data: {json.dumps({'error': lost})}\n\ndata: [DONE]\n\n"
        return StreamingResponse(iter([event]), media_type="text/event-stream")
    if how == "quote":
        return JSONResponse({"detail": f"Generation failed: {lost}"}, 500)
    raise RuntimeError(lost)


async def wraps(request: Request) -> JSONResponse:
    """Its server has an exception of its own for it."""
    try:
        raise RuntimeError(OUT_OF_MEMORY)
    except RuntimeError as e:
        raise LookupError("the engine failed") from e


async def memory(request: Request) -> JSONResponse:
    raise MemoryError


async def quotes(request: Request) -> JSONResponse:
    """It answers with MLX's own words."""
    status = int(request.query_params.get("status", 500))
    return JSONResponse({"detail": f"Generation failed: {OUT_OF_MEMORY}"}, status)


async def hides(request: Request) -> JSONResponse:
    """Its words tell of nothing; the fault was counted."""
    testing.record_fault(2)
    raise HTTPException(int(request.query_params.get("status", 500)), "it failed")


async def own(request: Request) -> JSONResponse:
    """What is no fault stays the application's."""
    if "raise" in request.query_params:
        raise ValueError("mine")
    return JSONResponse({"detail": "mine"}, 500, headers={"x-mine": "1"})


async def of_a_group(request: Request) -> JSONResponse:
    """A task group ends with what has failed in it, and with what that cancelled."""
    parts = [asyncio.CancelledError(), RuntimeError(OUT_OF_MEMORY)]
    raise BaseExceptionGroup("tasks", parts)  # type: ignore[name-defined]  # noqa: F821


async def background(request: Request) -> JSONResponse:
    async def later() -> None:
        events.append("background began")
        await asyncio.sleep(0.2)
        events.append("background ended")

    return JSONResponse({"ok": True}, background=BackgroundTask(later))


async def fails_later(request: Request) -> StreamingResponse:
    """A stream that fails after two events; how, the query says."""
    how = request.query_params.get("how", "raise")

    async def parts() -> AsyncIterator[str]:
        yield "data: one\n\n"
        yield "data: two\n\n"
        if how == "raise":
            raise RuntimeError(OUT_OF_MEMORY)
        if how == "quote":
            yield f"data: Generation failed: {OUT_OF_MEMORY}\n\n"
        if how == "crlf":
            yield "data: [DONE] is not the end\r\n\r\n"
            yield "data:[DONE]\r\n\r\n"
            raise RuntimeError(OUT_OF_MEMORY)
        if how == "answer":
            done = {"type": "response.completed", "response": {"text": OUT_OF_MEMORY}}
            yield f"data: {json.dumps({**done, 'error': None})}\n\n"
        if how == "failed":
            yield f"data: {json.dumps({'error': {'message': OUT_OF_MEMORY}})}\n\n"
        if how == "done":
            yield f'data: {{"error": "{OUT_OF_MEMORY}"}}\n\ndata: [DONE]\n\n'

    kind = request.query_params.get("type", "text/event-stream")
    headers = {"content-encoding": request.query_params.get("encoding", "identity")}
    return StreamingResponse(parts(), media_type=kind, headers=headers)


async def one_part(request: Request) -> StreamingResponse:
    """Nothing fails: parts of some kind, and then what is not waited for."""

    async def parts() -> AsyncIterator[str]:
        yield "one "
        yield "two"

    return StreamingResponse(parts(), background=BackgroundTask(asyncio.sleep, 0.3))


async def waits(request: Request) -> PlainTextResponse:
    """Until its client has left, or the server ends."""
    events.append("waits")
    try:
        await asyncio.sleep(300)
    except asyncio.CancelledError:
        events.append("cancelled")
        raise
    return PlainTextResponse("too late")


async def streams(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield "data: one\n\n"
        await asyncio.sleep(300)

    return StreamingResponse(parts(), media_type="text/event-stream")


def in_a_thread(request: Request) -> PlainTextResponse:
    """What Starlette runs in a thread cannot be cancelled."""
    threading.Event().wait(300)
    return PlainTextResponse("too late")


async def dies(request: Request) -> PlainTextResponse:
    testing.throw_on_foreign_thread()
    await asyncio.sleep(300)
    return PlainTextResponse("too late")


async def socket_fails(websocket: WebSocket) -> None:
    """At its client's first word; or once that has left."""
    await websocket.accept()
    with contextlib.suppress(Exception):
        if await websocket.receive_text() == "leaves":
            await websocket.receive_text()
    raise RuntimeError(OUT_OF_MEMORY)


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    with contextlib.suppress(Exception):
        while True:
            await websocket.send_text(await websocket.receive_text())


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    events.append("up")
    yield
    events.append("down")


async def passes(request: Request, call_next):  # type: ignore[no-untyped-def]
    return await call_next(request)


def make(middleware: bool = False) -> Starlette:
    """The application; with a middleware of the kind that runs it in a task group."""
    handlers = {
        "raises": raises,
        "loses": loses,
        "wraps": wraps,
        "memory": memory,
        "quotes": quotes,
        "hides": hides,
        "own": own,
        "background": background,
        "of_a_group": of_a_group,
        "parts": one_part,
        "fails_later": fails_later,
        "waits": waits,
        "streams": streams,
        "in_a_thread": in_a_thread,
        "dies": dies,
        "v1/messages": raises,
    }
    routes = [Route(f"/{path}", handler) for path, handler in handlers.items()]
    return Starlette(
        routes=[
            *routes,
            WebSocketRoute("/echo", echo),
            WebSocketRoute("/socket_fails", socket_fails),
        ],
        lifespan=lifespan,
        middleware=[Middleware(BaseHTTPMiddleware, passes)] if middleware else [],
    )


if __name__ == "__main__":
    import uvicorn

    from mlx_safe import asgi

    fd = int(sys.argv[1])
    config = uvicorn.Config(asgi.protect(make(), health="/health"), fd=fd)
    uvicorn.Server(config).run()
    os._exit(0)
