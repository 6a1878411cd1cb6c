"""`protect`: an ASGI application whose clients get an answer when the GPU fails.

For any server of the ASGI kind (FastAPI, Starlette, Quart), whatever runs it. Needs
nothing but the standard library.

A fault that the application raises, or answers with a 5xx, becomes the error response
that `mlx_safe.errors.reply_for` has for it: OpenAI's body, or Anthropic's below
``/v1/messages``, with ``Retry-After`` where a later try makes sense. A stream of events
that has begun ends with an error event, and with ``[DONE]`` as OpenAI's do. When the
process must be replaced, every open request is answered at once, and then it leaves
with status 75.

What it cannot mend: an answer that has begun and is no stream of events. It is cut, so
that the client sees an error and no whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from . import _core, _faults, _install, errors
from ._exceptions import behind
from ._faults import Fault

__all__ = ["ProtectedApp", "protect"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Of an answer with a 5xx status, which is held back until it is known what it is of.
HELD_MAX = 65536
HELD_S = 0.1
MAY_BE_A_FAULT = (500, 502, 503, 507)
# Of a stream: what may name a fault, or be its [DONE].
TAIL_MAX = 4096
# What MLX says of a failed command buffer, and of a failed call of CUDA.
_QUOTED = re.compile(
    r"\[METAL\][^\"\n]*|\w+\([^\"\n]*\) failed(?:: | with code: )[^\"\n\\]*"
)
# How long the clients' last words may take to get to their sockets.
ANSWER_S = 5.0
FLUSH_S = 0.1
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def protect(
    app: App, *, health: str | None = None, metrics: str | None = None
) -> ProtectedApp:
    """Puts ``app`` under protection:

        app = mlx_safe.asgi.protect(FastAPI())

    Args:
        app: an ASGI 3 application. Websockets and the lifespan pass by; a websocket is
            closed with code 1012 when the process must be replaced.
        health: a path, such as ``"/health"``, that is answered here: 200 while requests
            can be served, 503 once the process must be replaced. None: not at all.
        metrics: a path, such as ``"/metrics"``, that is answered here as Prometheus
            reads it (text format 0.0.4): faults of the process, open requests, and how
            many were answered for a fault, by its code. None: not at all.
    """
    return ProtectedApp(app, health, metrics)


class ProtectedApp:
    """What `protect` returns: itself an ASGI application. One event loop at a time.

    Attributes:
        app: the application that is protected.
    """

    def __init__(
        self, app: App, health: str | None = None, metrics: str | None = None
    ) -> None:
        self.app = app
        self._health = health
        self._metrics = metrics
        self._answered: Counter[str] = Counter()
        self._open: set[_Exchange] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lost: errors.GPUError | None = None
        self._subscription: _faults.Subscription | None = None
        self._all_answered = threading.Event()

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        self._begin()
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == self._health:
            await self._answer_health(send)
            return
        if scope["type"] == "http" and scope["path"] == self._metrics:
            await _send_bytes(send, 200, self._in_prometheus_words(), METRICS_TYPE)
            return
        exchange = _Exchange(scope, send)
        if self._lost is not None:
            exchange.end(self._lost)
        self._open.add(exchange)
        try:
            await exchange.run(self.app, receive)
        finally:
            self._open.discard(exchange)
            if exchange.code is not None:
                self._answered[exchange.code] += 1
            if exchange.fault is not None and exchange.fault.fatal:
                self._replace(exchange.fault)
            self._note_answered()

    def _begin(self) -> None:
        """Once, in the loop that serves: the application may be made before it runs."""
        if self._subscription is None:
            self._loop = asyncio.get_running_loop()
            self._subscription = _faults.on_fault(self._on_fault, drains=True)
            active = _install.status()
            if active.on_terminate != "drain":
                _install.install(on_terminate="drain", signals=active.signals)

    async def _answer_health(self, send: Send) -> None:
        if self._lost is None:
            await _send_body(send, 200, {"status": "ok"}, {})
        else:
            reply = errors.reply_for(self._lost)
            assert reply is not None
            await _send_json(send, reply, anthropic=False)

    def _in_prometheus_words(self) -> bytes:
        answered = "mlx_safe_fault_answers_total"
        lines = [
            "# TYPE mlx_safe_faults_total counter",
            f"mlx_safe_faults_total {_core.epoch()}",
            "# TYPE mlx_safe_requests_open gauge",
            f"mlx_safe_requests_open {len(self._open)}",
            f"# TYPE {answered} counter",
            *(f'{answered}{{code="{c}"}} {n}' for c, n in self._answered.items()),
        ]
        return "\n".join([*lines, ""]).encode()

    # -- the process must be replaced ------------------------------------------------

    def _on_fault(self, fault: Fault) -> None:
        """On the thread of the callbacks; blocks until all have their answers."""
        loop = self._loop
        if not fault.fatal or loop is None:
            return
        if not loop.is_running():  # it serves nobody, and the process is not its own
            return
        lost = errors.from_faults([fault])
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._replace, lost)
            self._all_answered.wait(ANSWER_S)
        if fault.source != "terminate":  # else the parked thread ends the process
            _leave()

    def _replace(self, lost: errors.GPUError) -> None:
        """In the loop: ends every open request with ``lost``."""
        if self._lost is None:
            self._lost = lost
            for exchange in self._open:
                exchange.end(lost)
            if not lost.faults:  # nobody was called back for it
                threading.Thread(target=self._leave_when_answered, daemon=True).start()
        self._note_answered()

    def _note_answered(self) -> None:
        if self._lost is not None and not self._open and self._loop is not None:
            # What was written is on its way to the sockets.
            self._loop.call_later(FLUSH_S, self._all_answered.set)

    def _leave_when_answered(self) -> None:
        self._all_answered.wait(ANSWER_S)
        _leave()


def _leave() -> None:
    # Not by sys.exit: the interpreter would wait for MLX, whose threads may be lost.
    sys.stdout.flush()
    sys.stderr.flush()
    _core.remove_run_file()
    os._exit(_faults.EXIT_REPLACE)


class _Exchange:
    """One request and its answer.

    Attributes:
        fault: what the request ended with, if it was a fault.
        code: of the error response that it was given here; None: none.
    """

    def __init__(self, scope: MutableMapping[str, Any], send: Send) -> None:
        self._scope = scope
        self._send = send
        self._since = _core.epoch()
        self._lost: asyncio.Future[errors.GPUError] = (
            asyncio.get_running_loop().create_future()
        )
        # A 5xx, or a stream's end, held back until it is known whether a fault is
        # behind it.
        self._held: list[Message] = []
        self._held_size = 0
        self._releasing: asyncio.Task[None] | None = None
        self._tail = b""
        self._has_begun = False
        self._is_over = False
        self._is_events = False
        self.fault: errors.GPUError | None = None
        self.code: str | None = None

    def end(self, lost: errors.GPUError) -> None:
        """The process is lost; called in the loop."""
        if not self._lost.done():
            self._lost.set_result(lost)

    async def run(self, app: App, receive: Receive) -> None:
        """Has ``app`` answer, until the process is lost."""
        try:
            await self._run(app, receive)
        finally:
            if self._releasing is not None:
                self._releasing.cancel()

    async def _run(self, app: App, receive: Receive) -> None:
        if self._lost.done():
            await self._fail(self._lost.result())
            return
        # A task of its own: what runs in a thread of the application's cannot be
        # cancelled, and its client must not wait for it when the process is lost.
        task = asyncio.ensure_future(app(self._scope, receive, self._pass))
        ends: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        except asyncio.CancelledError:  # the server gives the request up
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if not task.done():
            task.cancel()
            await self._fail(self._lost.result())
            return
        try:
            task.result()
        except Exception as e:
            if not await self._answer_for(e):
                raise
        else:
            await self._release()

    async def _answer_for(self, exc: Exception) -> bool:
        """Whether ``exc`` comes of a fault or a lack of memory, and has its answer."""
        self.fault = _fault_behind(exc) or self._logged()
        if not self._is_over and await self._fail(self.fault or exc):
            return True
        await self._release()
        return False

    async def _pass(self, message: Message) -> None:
        """Stands for the server's ``send``."""
        kind = message["type"]
        if self._is_over and kind.startswith("http.response"):
            return
        if kind == "http.response.start" and message["status"] >= 500:
            self._held.append(message)
            return
        if kind == "http.response.start":
            self._is_events = _is_event_stream(message)
            self._has_begun = True
        elif kind == "http.response.body":
            if self._held and not self._has_begun:
                await self._hold(message)
                return
            if self._is_events:
                message = self._complete(message)
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    def _complete(self, message: Message) -> Message:
        """A stream whose last event quotes a fault, and no [DONE], gets both ends."""
        body = message.get("body", b"")
        self._tail = (self._tail + body)[-TAIL_MAX:]
        if message.get("more_body", False) or self._has_done():
            return message
        found = _named_in(self._tail.rstrip().rpartition(b"\n\n")[2])
        if found is None:
            # Starlette's middleware ends a stream first and raises what ended it then.
            self._release_soon()
            self._held = [{"type": "http.response.body", "body": b""}]
            return {**message, "more_body": True}
        self.fault = found
        self.code = found.kind.slug
        return {**message, "body": body + self._last_event(found)}

    async def _hold(self, message: Message) -> None:
        self._held.append(message)
        self._held_size += len(message.get("body", b""))
        if self._held_size > HELD_MAX:
            await self._release()
        elif not message.get("more_body", False):
            text = b"".join(m.get("body", b"") for m in self._held)
            self.fault = _named_in(text)
            if self.fault is None and self._held[0]["status"] in MAY_BE_A_FAULT:
                self.fault = self._logged()
            if self.fault is not None:
                await self._fail(self.fault)
            else:
                # Starlette answers 500 first and raises the exception then.
                self._release_soon()

    def _release_soon(self) -> None:
        """Unless the application ends before; a background task may take long."""

        async def release() -> None:
            await asyncio.sleep(HELD_S)
            await self._release()

        self._releasing = asyncio.ensure_future(release())

    async def _release(self) -> None:
        """Sends what was held back: it is of no fault."""
        held, self._held = self._held, []
        for message in held:
            self._has_begun = True
            more = message["type"] == "http.response.start" or message.get("more_body")
            self._is_over = not more
            await self._send(message)

    def _logged(self) -> errors.GPUError | None:
        """The faults since the request came, whosever they were."""
        logged = _faults.faults(self._since)
        return errors.from_faults(logged) if logged else None

    async def _fail(self, exc: Exception) -> bool:
        """Answers with the error response of ``exc``; False: that cannot be done."""
        reply = errors.reply_for(exc)
        if reply is None or self._is_over:
            return False
        if self._scope["type"] == "websocket":
            self._is_over = True
            await self._send({"type": "websocket.close", "code": 1012})
        elif not self._has_begun:
            self._held = []
            self._is_over = True
            await _send_json(self._send, reply, self._is_anthropic())
        elif self._is_events:
            self._held = []
            self._is_over = True
            last = b"" if self._has_done() else self._last_event(exc)
            await self._send({"type": "http.response.body", "body": last})
        else:
            return False
        self.code = reply.code
        return True

    def _last_event(self, exc: Exception) -> bytes:
        reply = errors.reply_for(exc)
        assert reply is not None
        if self._is_anthropic():
            text = json.dumps(reply.anthropic())
            return f"event: error\ndata: {text}\n\n".encode()
        return f"data: {json.dumps(reply.openai())}\n\ndata: [DONE]\n\n".encode()

    def _is_anthropic(self) -> bool:
        return bool(self._scope["path"].startswith("/v1/messages"))

    def _has_done(self) -> bool:
        return b"data: [DONE]" in self._tail


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )


def _fault_behind(exc: BaseException) -> errors.GPUError | None:
    """The fault that ``exc``, a cause of it, or one of a group stands for."""
    found = (errors.from_exception(one) for one in behind(exc))
    return next((fault for fault in found if fault is not None), None)


def _named_in(text: bytes) -> errors.GPUError | None:
    """The fault whose message of MLX is quoted in ``text``, JSON or not."""
    for found in _QUOTED.finditer(text.decode("utf-8", "replace")):
        kind = errors.kind_in_message(found[0])
        if kind is not None:
            return kind.make(found[0])
    return None


async def _send_json(send: Send, reply: errors.Reply, anthropic: bool) -> None:
    body = reply.anthropic() if anthropic else reply.openai()
    await _send_body(send, reply.status, body, reply.headers())


async def _send_body(
    send: Send, status: int, body: dict[str, Any], headers: dict[str, str]
) -> None:
    content = json.dumps(body).encode()
    await _send_bytes(send, status, content, "application/json", headers)


async def _send_bytes(
    send: Send,
    status: int,
    content: bytes,
    kind: str,
    headers: dict[str, str] | None = None,
) -> None:
    fields = {
        "content-type": kind,
        "content-length": str(len(content)),
        **(headers or {}),
    }
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": content})
