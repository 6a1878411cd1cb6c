"""mlx-lm's HTTP handler with an answer to every failure."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.server import APIHandler

from .generator import Answered
from .handover import Message, State
from .metrics import CONTENT_TYPE
from .recorder import name_request
from .replies import BadRequest, Reply, reply_for
from .wire import Wire

__all__ = ["ProtectedHandler"]

log = logging.getLogger("mlx_safe.server")

# What a read or a write ends with when nobody is there, or reads on (`timeout`).
GONE = (ConnectionError, TimeoutError)
# mlx-lm tells with them how far it has read a prompt, after each step.
COMMENT = b": keepalive"


def _in_our_form(data: bytes) -> bytes:
    """``{"error": "text"}`` of mlx-lm, as the body that all other refusals have."""
    reply = reply_for(BadRequest(json.loads(data)["error"]))
    return json.dumps({"error": reply.error()}).encode()


class _Heard:
    """mlx-lm's generator, as one handler has it: each token is heard of."""

    def __init__(self, generator: Any, hear: Callable[[], None]) -> None:
        self._generator = generator
        self._hear = hear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, *args: Any, **kwargs: Any) -> tuple[Any, Iterator[Any]]:
        context, responses = self._generator.generate(*args, **kwargs)
        return context, self._each(responses)

    def _each(self, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            self._hear()
            yield response


class ProtectedHandler(Wire, APIHandler):  # type: ignore[misc]
    """One connection. Runs on a thread of its own."""

    response_generator: Any  # a `generator.ProtectedResponseGenerator`
    timeout = 120  # seconds for one read or write; a body may be slow, not endless
    keepalive_after_s = 5.0

    def begin(self) -> None:
        self.created = int(time.time())  # mlx-lm sets it once for each connection
        self._asked_at = time.monotonic()

    # A stream's 200 waits for its first token: until then a failure can still be
    # answered with its own status, which clients know how to retry. Only one that
    # takes its time has comments before.

    def shape(self, data: bytes) -> bytes:
        if data.startswith(COMMENT) and not self._is_late():
            return b""
        # What mlx-lm itself refuses; it writes the body in one go.
        if data.startswith(b'{"error": "'):
            return _in_our_form(data)
        return data

    def _is_late(self) -> bool:
        return time.monotonic() - self._asked_at >= self.keepalive_after_s

    def _hear(self) -> None:
        """A token has been made; it may have no text yet, as those of tool calls."""
        if not self.stream or not self._is_late():
            return
        if time.monotonic() - self.wfile.sent_at >= max(self.keepalive_after_s, 1.0):
            self.wfile.write(COMMENT + b"\n\n")

    def _set_cors_headers(self) -> None:
        """The last that mlx-lm does before it ends the headers of any answer."""
        super()._set_cors_headers()
        ticket = self.response_generator.departures.ticket(
            getattr(self, "request_id", None)
        )
        for name, value in ticket.headers.items() if ticket else ():
            self.send_header(name, value)

    # -- routes -----------------------------------------------------------------

    def do_GET(self) -> None:
        if self.path == "/metrics":
            body = self.response_generator.metrics.render()
            self._send_body(200, CONTENT_TYPE, body)
        else:
            super().do_GET()

    def handle_models_request(self) -> None:
        try:
            super().handle_models_request()
        except Exception as e:
            # mlx-lm has sent its 200 and then found no cache of the hub here.
            log.info("no models of the hub are listed: %s", e)
            model = self.response_generator.cli_args.model
            listed = [{"id": model, "object": "model", "created": self.created}]
            body = {"object": "list", "data": listed if model else []}
            self.wfile.write(json.dumps(body).encode())

    def handle_health_check(self) -> None:
        condition = self.response_generator.condition
        thread = self.response_generator._generation_thread
        reason = condition.reason
        if reason is None and not thread.is_alive():
            reason = "the generation thread has ended"
        if reason is None:
            self._send_json(200, {"status": "ok"})
        else:
            self._send_json(
                503,
                {"status": "unavailable", "state": condition.state, "reason": reason},
            )

    def do_POST(self) -> None:
        try:
            super().do_POST()
        except ConnectionError:
            self._note_departure()
        except Exception as e:
            # handle_completion deals with its own, so mlx-lm was still
            # reading the body (0.31.3 raises there, 0.32 answers).
            log.info("a request could not be read: %s", e)
            self._send_failure(BadRequest(str(e) or "The request is invalid."))

    def _check_stream_options(self) -> None:
        options = getattr(self, "stream_options", None)
        if options is None:
            return
        if not isinstance(options, dict):
            raise BadRequest("stream_options must be an object.")
        # mlx-lm (0.31, 0.32) asks for it without a look, after the whole answer.
        self.stream_options = {"include_usage": False, **options}

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        name_request(request, self.request_id, self.path)
        self._asked_at = time.monotonic()
        self.held.reach(State.RUNNING)
        self.response_generator = _Heard(self.response_generator, self._hear)
        try:
            self._check_stream_options()
            departures = self.response_generator.departures
            with departures.watching(self.request_id, self.connection):
                super().handle_completion(request, stop_words)
        except Answered as e:
            self._end(e.error)
        except Exception as e:
            self._end(e)
        else:
            self._count("completed")
            self.server.handover.tell_once(Message.WORKED)

    def _end(self, exc: Exception) -> None:
        """The request has ended with ``exc``: counts it, then tells the client."""
        if isinstance(exc, GONE):
            self._count("client_left")
            self._note_departure()
        elif self.response_generator.condition.restarts and self.leave_to_the_next():
            self._count("handed_over")
            log.info("%s is left to the next server", self.request_id)
        else:
            self._count(reply_for(exc).code)
            self._send_failure(exc)

    def _count(self, outcome: str) -> None:
        self.response_generator.metrics.requests.labels(outcome).inc()

    # -- answers ------------------------------------------------------------------

    def _note_departure(self) -> None:
        self.abandon()
        request_id = getattr(self, "request_id", "-")
        log.info("the client of %s went away; its request is cancelled", request_id)

    def _send_failure(self, exc: Exception) -> None:
        """Tells the client of ``exc``."""
        reply = reply_for(exc)
        try:
            if not self.wfile.sent:
                self._send_error_body(reply)
            elif self.stream:
                self._send_error_event(reply)
            else:
                self.abandon()
        except GONE:
            self._note_departure()

    def _send_error_body(self, reply: Reply) -> None:
        self.drop_head()  # of the 200 that mlx-lm had begun
        body = json.dumps({"error": reply.error()}).encode()
        self._send_body(reply.status, "application/json", body, reply.retry_after)

    def _send_error_event(self, reply: Reply) -> None:
        event = {
            "id": getattr(self, "request_id", None),
            "object": "error",
            "model": getattr(self, "requested_model", None),
            "created": getattr(self, "created", int(time.time())),
            "error": reply.error(),
        }
        self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())
        self.wfile.flush()

    def _send_json(self, status: int, value: dict[str, Any]) -> None:
        self._send_body(status, "application/json", json.dumps(value).encode())

    def _send_body(
        self,
        status: int,
        content_type: str,
        body: bytes,
        retry_after: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
