"""`protect`: an ASGI application whose clients get an answer when the GPU fails.

For any server of the ASGI kind (FastAPI, Starlette, Quart), whatever runs it. Needs
nothing but the standard library.

A fault that the application raises, or answers with a 5xx, becomes the error response
that `mlx_safe.errors.reply_for` has for it. Its body is OpenAI's, below
``/v1/messages`` Anthropic's, and it has ``Retry-After`` where a later try makes sense.
A stream of events that has begun ends with an error event, and with ``[DONE]`` as
OpenAI's do. When the process must be replaced, every open request is answered at once,
and then it leaves with status 75.

| Module | What is in it |
|---|---|
| `exchange` | one request and its answer |
| `children` | the process that has the model is a child, which has ended |
| `lost` | whether the GPU is as lost as a text says, and the end of the process |
| `messages` | what goes over ASGI, and what there is to read in it |

What it cannot mend: an answer that has begun and is no stream of events. It is cut, so
that the client sees an error and no whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

from .. import _core, _faults, _install, errors
from .._fault import Fault
from .children import Children, stay
from .exchange import Exchange
from .lost import gpu_is_lost, leave
from .messages import App, Receive, Send, route, send_bytes, send_json

__all__ = ["ProtectedApp", "protect"]

# How long the clients' last words may take to get to their sockets.
ANSWER_S = 5.0
FLUSH_S = 0.1
# How often the children are looked at while requests are open.
LOOK_S = 0.05
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# In the scope of a request that is under protection already.
_MARK = "mlx_safe.protected"
# All that serve in this process, each perhaps in a loop of its own: it leaves when the
# clients of all have their answers.
_serving: list[ProtectedApp] = []
log = logging.getLogger("mlx_safe")


def protect(
    app: App, *, health: str | None = None, metrics: str | None = None
) -> ProtectedApp:
    """Puts ``app``, which is complete, under protection:

        app = FastAPI()
        ...
        app = mlx_safe.asgi.protect(app)

    The class of what it returns, `ProtectedApp`, is an ASGI middleware as well:
    ``app.add_middleware(ProtectedApp, health="/health")`` in Starlette and FastAPI,
    ``app.asgi_app = protect(app.asgi_app)`` in Quart. Where it is there twice, the
    outer one answers.

    Args:
        app: an ASGI 3 application, run by asyncio. The lifespan passes by, and so do
            websockets. One that ends with a fault is closed with code 1013 (try again
            later) or 1011, and with 1012 when the process must be replaced.
        health: a path, such as ``"/health"``, below where the application is mounted,
            whose GET and HEAD are answered here: 200 while requests can be served, 503
            once the process must be replaced. None: not at all.
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
        if not callable(app):
            raise TypeError(f"protect() needs an ASGI application, not {app!r}")
        for name, path in (("health", health), ("metrics", metrics)):
            if path is not None and not path.startswith("/"):
                raise ValueError(f"{name} must begin with a slash, not {path!r}")
        self.app = app
        self._health = health
        self._metrics = metrics
        self._answered: Counter[str] = Counter()
        self._open: set[Exchange] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lost: errors.GPUError | None = None
        self._subscription: _faults.Subscription | None = None
        # The faults after this one are called back.
        self._subscribed_at = 0
        self._all_answered = threading.Event()
        self._children = Children()
        self._looking: asyncio.TimerHandle | None = None

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        self._begin()
        if scope["type"] == "http" and await self._answer_own(scope, send):
            return
        if scope["type"] not in ("http", "websocket") or _MARK in scope:
            await self.app(scope, receive, send)
            return
        # Not a copy: middleware around it may read what the application adds.
        scope[_MARK] = True
        exchange = Exchange(scope, send)
        if self._lost is not None:
            exchange.end(self._lost)
        self._open.add(exchange)
        if self._looking is None:
            self._children.lost()  # nobody waited for those
            self._look_soon()
        else:
            self._children.note()
        try:
            await exchange.run(self.app, receive)
        finally:
            self._open.discard(exchange)
            if exchange.code is not None:
                self._answered[exchange.code] += 1
            if exchange.fatal is not None:
                self._look_into(exchange.fatal)
            self._note_answered()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            # Not passed on: the application's `run` would serve it unprotected.
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: complete the "
                "application first and protect it last, or reach it by its `app`"
            )

    def _begin(self) -> None:
        """In the loop that serves: the application may be made before it runs."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._looking = loop, None
        if self._subscription is None:
            stay()
            self._subscription = _faults.on_fault(self._on_fault, drains=True)
            self._subscribed_at = _core.epoch()  # in doubt it leaves by itself, too
            _serving.append(self)
            active = _install.status()
            if active.on_terminate != "drain":
                _install.install(on_terminate="drain", signals=active.signals)

    async def _answer_own(self, scope: MutableMapping[str, Any], send: Send) -> bool:
        """Whether it is a request for `health` or `metrics`, which has its answer."""
        path, head = route(scope), scope["method"] == "HEAD"
        if path not in (self._health, self._metrics):
            return False
        if scope["method"] not in ("GET", "HEAD"):
            return False
        if path == self._metrics:
            page = self._in_prometheus_words()
            await send_bytes(send, 200, page, METRICS_TYPE, head=head)
        elif self._lost is None:
            await send_json(send, 200, {"status": "ok"}, head=head)
        else:
            reply = errors.reply_for(self._lost)
            assert reply is not None
            after = [
                (k.lower().encode(), v.encode()) for k, v in reply.headers().items()
            ]
            await send_json(send, reply.status, reply.openai(), after, head=head)
        return True

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

    def _look_soon(self) -> None:
        assert self._loop is not None
        self._looking = self._loop.call_later(LOOK_S, self._look_at_children)

    def _look_at_children(self) -> None:
        """While requests are open: those of a child that has ended get an answer.

        Nothing says whose child has which request, so all have it.
        """
        self._looking = None
        for lost in self._children.lost():
            log.error("%s; requests answered: %d", lost, len(self._open))
            for exchange in self._open:
                exchange.end(lost)
        if self._open:
            self._look_soon()

    # -- the process must be replaced ------------------------------------------------

    def _on_fault(self, fault: Fault) -> None:
        """On the thread of the callbacks; blocks until all have their answers."""
        if not fault.fatal or not self._is_serving():
            return
        _answer_all(errors.from_faults([fault]))
        if fault.source != "terminate":  # else the parked thread ends the process
            leave()

    def _is_serving(self) -> bool:
        """Else it serves nobody, and the process is not its own."""
        return self._loop is not None and self._loop.is_running()

    def _replace(self, lost: errors.GPUError) -> None:
        """In the loop: ends every open request with ``lost``."""
        if self._lost is None:
            self._lost = lost
            _faults.leave_soon()
            for exchange in self._open:
                exchange.end(lost)
        self._note_answered()

    def _note_answered(self) -> None:
        if self._lost is not None and not self._open and self._loop is not None:
            # What was written is on its way to the sockets.
            self._loop.call_later(FLUSH_S, self._all_answered.set)

    def _look_into(self, fatal: errors.GPUError) -> None:
        """In the loop: a request ended with ``fatal``; the process, too, if it is true.

        It is where it was counted. Else there is nothing but a text, which may be a
        client's words.
        """
        counted = [f for f in (*fatal.faults, *_faults.faults()) if f.fatal]
        if any(f.number > self._subscribed_at for f in counted):
            self._replace(fatal)
            return  # `_on_fault` is called, too

        def leave_if_so() -> None:
            if counted or gpu_is_lost():
                _answer_all(fatal)
                leave()

        threading.Thread(target=leave_if_so, name="mlx-safe-leave", daemon=True).start()


def _answer_all(lost: errors.GPUError) -> None:
    """Ends every open request of the process with ``lost``. Blocks; not in a loop."""
    serving = [app for app in _serving if app._is_serving()]
    for app in serving:
        assert app._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended
            app._loop.call_soon_threadsafe(app._replace, lost)
    until = time.monotonic() + ANSWER_S
    for app in serving:
        app._all_answered.wait(max(until - time.monotonic(), 0.0))
