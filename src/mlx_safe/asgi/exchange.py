"""One request and its answer. Event loop's thread."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from .. import _core, _faults, errors
from .messages import (
    App,
    Message,
    Receive,
    Send,
    answerable,
    decoded,
    fault_at_the_end,
    has_ended,
    is_anthropic,
    is_event_stream,
    is_whole,
    kept_headers,
    named_in,
    quoted_by,
    send_json,
    tells_of_error,
)

__all__ = ["Exchange"]

log = logging.getLogger("mlx_safe")

# Of an answer with a 5xx status, which is held back until it is known what it is of.
HELD_MAX = 65536
HELD_S = 0.1
# One that its application does not end: it may be a stream, or wait for its client.
UNENDED_S = 5.0
MAY_BE_A_FAULT = (500, 502, 503, 507)
# Of a fault that a request has met: until a client is answered for it. A step of
# generation may take so long before it raises the fault.
UNREPORTED_S = 2.0
UNREPORTED_LOOK_S = 0.01
# Of a stream: what may name a fault, or be its [DONE].
TAIL_MAX = 4096


class Exchange:
    """One request and its answer.

    Attributes:
        fatal: the fault that the request ended with and that would end the process. One
            without ``faults`` is a text, which may be a client's own words.
        code: of the error response that it was given here; None: none.
    """

    def __init__(self, scope: MutableMapping[str, Any], send: Send) -> None:
        self._scope = scope
        self._send = send
        self._since = _core.epoch()
        self._lost: errors.GPUError | None = None
        # Done when the application has ended, or the process is lost.
        self._ends: asyncio.Future[None] | None = None
        # A 5xx, or a stream's end, held back until it is known whether a fault is
        # behind it.
        self._held: list[Message] = []
        self._held_size = 0
        self._releasing: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()
        self._tail = b""
        self._has_begun = False
        self._has_parts = False
        # The answer has its end; and that was not the application's.
        self._is_over = False
        self._is_ours = False
        self._is_events = False
        self._is_2xx = False
        # It says how long it is, or has no body.
        self._is_whole = False
        # The fault that this answer was ended for, as no other was.
        self._unreported: errors.GPUError | None = None
        self.fatal: errors.GPUError | None = None
        self.code: str | None = None

    def end(self, lost: errors.GPUError) -> None:
        """The process is lost; called in the loop."""
        if self._lost is None:
            self._lost = lost
            self._wake()

    def _wake(self, _: object = None) -> None:
        if self._ends is not None and not self._ends.done():
            self._ends.set_result(None)

    async def run(self, app: App, receive: Receive) -> None:
        """Has ``app`` answer, until the process is lost."""
        try:
            await self._run(app, receive)
        finally:
            if self._releasing is not None:
                self._releasing.cancel()
            if not self._is_over:  # its client has left, or its server cuts it
                self._deal_with()

    async def _run(self, app: App, receive: Receive) -> None:
        if self._lost is not None:
            await self._fail(self._lost)
            return
        if self._scope["type"] == "websocket":
            receive = self._until_it_leaves(receive)
        # A task of its own: what runs in a thread of the application's cannot be
        # cancelled, and its client must not wait for it when the process is lost.
        self._ends = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(app(self._scope, receive, self._pass))
        task.add_done_callback(self._wake)
        try:
            await self._ends
        except asyncio.CancelledError:  # the server gives the request up
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if not task.done():
            task.cancel()
            assert self._lost is not None  # it has woken this
            await self._fail(self._lost)
            return
        try:
            task.result()
        except BaseException as e:
            # A group may have a fault and what it has cancelled.
            is_group = hasattr(e, "exceptions")
            if not (isinstance(e, Exception) or is_group):
                raise
            if not await self._answer_for(e):
                raise
        else:
            await self._release()

    def _until_it_leaves(self, receive: Receive) -> Receive:
        """A client that has left gets nothing more."""

        async def receive_and_look() -> Message:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self._is_over = True
            return message

        return receive_and_look

    async def _answer_for(self, exc: BaseException) -> bool:
        """Whether ``exc`` comes of a fault or a lack of memory, and has its answer."""
        if self._unreported is not None:  # of `_is_suspect`
            return self._is_ours
        self._deal_with()
        known = answerable(exc)
        logged = None if known is not None else self._logged()
        cause = known or logged
        if cause is None:
            known = cause = quoted_by(exc)
        self._note_fatal(cause)
        if cause is not None and await self._fail(cause):
            path = self._scope["path"]
            if known is None:
                # It may be nothing but the application's own, and nobody else logs it.
                log.error("%s: answered with %s", path, self.code, exc_info=exc)
            else:
                log.warning("%s: answered with %s: %s", path, self.code, known)
            return True
        if cause is not None and self._has_begun and not self._is_over:
            # Its end would make it look whole; without one the server cuts it.
            self._held = []
        await self._release()
        return False

    # -- what the application sends --------------------------------------------------

    async def _pass(self, message: Message) -> None:
        """Stands for the server's ``send``."""
        kind: str = message["type"]
        if self._sending.locked():  # what was held back goes first
            async with self._sending:
                pass
        if self._is_ours and kind.startswith(("http.response", "websocket")):
            return
        if self._unreported is not None or _faults.unreported(self._since):
            if self._tells_of_error(message):
                self._deal_with()
            elif self._is_right(message) and await self._is_suspect(message):
                return
        if kind == "http.response.start":
            if message["status"] >= 500:
                self._held.append(message)
                self._release_soon(UNENDED_S)
                return
            self._is_2xx = message["status"] < 300
            self._is_events = is_event_stream(message)
            self._is_whole = is_whole(message)
            self._has_begun = True
        elif kind == "http.response.body":
            if self._held and not self._has_begun:
                await self._hold(message)
                return
            if not self._passes_now(message):
                return
            if self._is_events:
                message = self._complete(message)
            self._is_over = not message.get("more_body", False)
            self._has_parts = True
        elif kind.startswith("http.response.") and self._held:
            # A body of another kind, such as a file's path; or what follows the end.
            await self._release()
        elif kind == "websocket.accept":
            self._has_begun = True
        elif kind == "websocket.close" or kind.startswith("websocket.http.response."):
            self._is_over = True  # closed, or refused with an answer of its own
        await self._send(message)

    # -- faults that a server swallows ------------------------------------------------

    def _tells_of_error(self, message: Message) -> bool:
        if message["type"] == "http.response.start":
            return bool(message["status"] >= 500)
        return self._is_events and tells_of_error(message.get("body", b""))

    def _is_right(self, message: Message) -> bool:
        """Whether its client takes it for a right answer, or for a part of one."""
        if message["type"] == "http.response.start":
            return bool(message["status"] < 300)
        return message["type"] == "http.response.body" and self._is_2xx

    def _deal_with(self) -> None:
        """A client is answered for the faults that this request has met."""
        if self._unreported is None and _faults.unreported(self._since):
            _faults.deal_with()

    async def _is_suspect(self, message: Message) -> bool:
        """A fault came since the request, and no client is answered for it.

        Its server may have swallowed it, and go on with caches that were not computed
        (fusion-mlx 0.10 does). True: the answer has its end here.

        Raises:
            GPUError: it cannot have one, and is cut.
        """
        until = time.monotonic() + UNREPORTED_S
        while self._unreported is None and time.monotonic() < until:
            await asyncio.sleep(UNREPORTED_LOOK_S)
            if not _faults.unreported(self._since):
                return False
        if self._unreported is None:
            self._unreported = self._logged()
            assert self._unreported is not None
            if not self._has_begun:
                self._held = [message]
            if await self._fail(self._unreported):
                path = self._scope["path"]
                log.warning(
                    "%s: answered with %s: %s", path, self.code, self._unreported
                )
                return True
        raise self._unreported

    def _passes_now(self, message: Message) -> bool:
        """The end of what came in parts waits until the application has ended.

        Starlette's `BaseHTTPMiddleware` ends a stream first and raises what ended it
        then (1.0). A middleware that compresses has its last bytes in that end.
        Without it the client sees that the stream is not whole.
        """
        if self._is_events or message.get("more_body", False) or self._is_over:
            return True
        if self._is_whole and not self._has_parts:
            return True
        self._held = [message]
        self._release_soon()
        return False

    def _complete(self, message: Message) -> Message:
        """A stream whose last event tells of a fault, and no [DONE], gets both ends."""
        body = message.get("body", b"")
        self._tail = (self._tail + body)[-TAIL_MAX:]
        if message.get("more_body", False):
            return message
        found = fault_at_the_end(self._tail, TAIL_MAX)
        self._note_fatal(found)
        if has_ended(self._tail):
            return message
        if found is None:
            # Starlette's middleware ends a stream first and raises what ended it then.
            self._release_soon()
            self._held = [{"type": "http.response.body", "body": b""}]
            return {**message, "more_body": True}
        self.code = found.kind.slug
        return {**message, "body": body + self._last_event(found)}

    async def _hold(self, message: Message) -> None:
        self._held.append(message)
        self._held_size += len(message.get("body", b""))
        if self._held_size > HELD_MAX:
            await self._release()
        elif not message.get("more_body", False):
            text = b"".join(m.get("body", b"") for m in self._held)
            may_be = self._held[0]["status"] in MAY_BE_A_FAULT
            logged = self._logged() if may_be else None
            found = logged or named_in(decoded(self._held[0], text, HELD_MAX))
            self._note_fatal(found)
            if found is not None:
                await self._fail(found)
            else:
                # Starlette answers 500 first and raises the exception then.
                self._release_soon()

    def _release_soon(self, after_s: float = HELD_S) -> None:
        """Unless the application ends before; a background task may take long."""

        async def release() -> None:
            await asyncio.sleep(after_s)
            await self._release()

        if self._releasing is not None:
            self._releasing.cancel()
        self._releasing = asyncio.ensure_future(release())

    async def _release(self) -> None:
        """Sends what was held back: it is of no fault."""
        async with self._sending:  # what is on its way to a slow client is waited for
            held, self._held = self._held, []
            for message in held:
                self._has_begun = True
                is_start = message["type"] == "http.response.start"
                self._is_over = not (is_start or message.get("more_body"))
                await self._send(message)

    def _note_fatal(self, fault: Exception | None) -> None:
        if isinstance(fault, errors.GPUError) and fault.fatal:
            self.fatal = fault

    def _logged(self) -> errors.GPUError | None:
        """The faults since the request came, whosever they were."""
        logged = _faults.faults(self._since)
        return errors.from_faults(logged) if logged else None

    # -- what is sent instead --------------------------------------------------------

    async def _fail(self, exc: Exception) -> bool:
        """Answers with the error response of ``exc``; False: that cannot be done."""
        reply = errors.reply_for(exc)
        if reply is None:
            return False
        async with self._sending:
            if self._is_over or not await self._answer(reply, exc):
                return False
        self.code = reply.code
        self._deal_with()
        return True

    async def _answer(self, reply: errors.Reply, exc: Exception) -> bool:
        if self._scope["type"] == "websocket":
            self._is_over = self._is_ours = True
            if self._has_begun or not self._can_refuse():
                code = 1013 if reply.retry_after is not None else 1011
                if self._lost is not None or self.fatal is not None:
                    code = 1012
                await self._send({"type": "websocket.close", "code": code})
            else:  # a close would be a 403, which says never to come again
                await self._send_whole(reply, {}, self._refuse)
        elif not self._has_begun:
            start = self._held[0] if self._held else {}
            self._held = []
            self._is_over = self._is_ours = True
            await self._send_whole(reply, start, self._send)
        elif self._is_events:
            self._held = []
            self._is_over = self._is_ours = True
            last = b"" if has_ended(self._tail) else self._last_event(exc)
            await self._send({"type": "http.response.body", "body": last})
        else:
            return False
        return True

    async def _send_whole(
        self, reply: errors.Reply, start: Message, send: Send
    ) -> None:
        own = [(k.lower().encode(), v.encode()) for k, v in reply.headers().items()]
        await send_json(
            send,
            reply.status,
            reply.anthropic() if self._is_anthropic() else reply.openai(),
            [*kept_headers(start), *own],
            head=self._scope.get("method") == "HEAD",
        )

    def _can_refuse(self) -> bool:
        """Whether a websocket that is not accepted yet can have an HTTP answer."""
        return "websocket.http.response" in (self._scope.get("extensions") or {})

    async def _refuse(self, message: Message) -> None:
        await self._send({**message, "type": f"websocket.{message['type']}"})

    def _last_event(self, exc: Exception) -> bytes:
        reply = errors.reply_for(exc)
        assert reply is not None
        if self._is_anthropic():
            text = json.dumps(reply.anthropic())
            return f"event: error\ndata: {text}\n\n".encode()
        return f"data: {json.dumps(reply.openai())}\n\ndata: [DONE]\n\n".encode()

    def _is_anthropic(self) -> bool:
        return is_anthropic(self._scope["path"])
