"""mlx-lm's HTTP handler with an answer to every failure."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from mlx_lm.server import APIHandler

from .generator import Answered, ProtectedResponseGenerator
from .metrics import CONTENT_TYPE
from .model_names import DEFAULT
from .recorder import name_request
from .replies import BadRequest, Reply, reply_for

__all__ = ["ProtectedHandler"]

log = logging.getLogger("mlx_safe.server")

# What a read or a write ends with when nobody is there, or reads on (`timeout`).
GONE = (ConnectionError, TimeoutError)


class _BodyWriter:
    """``wfile`` that sends held-back headers before its first byte."""

    def __init__(self, handler: ProtectedHandler, raw: Any) -> None:
        self._handler = handler
        self._raw = raw

    def write(self, data: bytes) -> int:
        self._handler.release_headers()
        self._handler.bytes_sent += len(data)
        # What mlx-lm itself refuses; it writes the body in one go.
        if data.startswith(b'{"error": "'):
            data = _in_our_form(data)
        return int(self._raw.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def _in_our_form(data: bytes) -> bytes:
    """``{"error": "text"}`` of mlx-lm, as the body that all other refusals have."""
    reply = reply_for(BadRequest(json.loads(data)["error"]))
    return json.dumps({"error": reply.error()}).encode()


class ProtectedHandler(APIHandler):  # type: ignore[misc]
    """One request. Runs on a thread of its own."""

    response_generator: ProtectedResponseGenerator
    timeout = 120  # seconds for one read or write; a body may be slow, not endless

    def setup(self) -> None:
        self._hold_headers = False
        self._logged_code: Any = None
        self.bytes_sent = 0
        super().setup()
        raw: Any = self.wfile
        self.wfile: Any = _BodyWriter(self, raw)

    # mlx-lm begins every answer with a 200; what is logged is what was sent.

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self._logged_code = code

    def finish(self) -> None:
        super().finish()
        if self._logged_code is not None:
            super().log_request(self._logged_code)

    # A stream's headers wait for its first byte: until then a failure can still
    # be answered with its own status, which clients know how to retry.

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._hold_headers = True

    def _set_cors_headers(self) -> None:
        """The last that mlx-lm does before it ends the headers of any answer."""
        super()._set_cors_headers()
        ticket = self.response_generator.departures.ticket(
            getattr(self, "request_id", None)
        )
        for name, value in ticket.headers.items() if ticket else ():
            self.send_header(name, value)

    def flush_headers(self) -> None:
        if not self._hold_headers:
            super().flush_headers()

    def release_headers(self) -> None:
        """Sends the headers that were held back, if any."""
        if self._hold_headers:
            self._hold_headers = False
            super().flush_headers()

    # -- routes -----------------------------------------------------------------

    def do_GET(self) -> None:
        if self.path == "/metrics":
            body = self.response_generator.metrics.render()
            self._send_body(200, CONTENT_TYPE, body)
        else:
            super().do_GET()

    def handle_models_request(self) -> None:
        names = self.response_generator.names.listed()
        listed = [{"id": n, "object": "model", "created": self.created} for n in names]
        self._send_json(200, {"object": "list", "data": listed})

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
        if self.requested_model == DEFAULT:
            self.requested_model: str = self.response_generator.names.default_name
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

    def _end(self, exc: Exception) -> None:
        """The request has ended with ``exc``: counts it, then tells the client."""
        if isinstance(exc, GONE):
            self._count("client_left")
            self._note_departure()
        else:
            self._count(reply_for(exc).code)
            self._send_failure(exc)

    def _count(self, outcome: str) -> None:
        self.response_generator.metrics.requests.labels(outcome).inc()

    # -- answers ------------------------------------------------------------------

    def _note_departure(self) -> None:
        self._hold_headers = False
        self._headers_buffer: list[bytes] = []
        request_id = getattr(self, "request_id", "-")
        log.info("the client of %s went away; its request is cancelled", request_id)

    def _send_failure(self, exc: Exception) -> None:
        """Tells the client of ``exc``."""
        reply = reply_for(exc)
        try:
            if self.bytes_sent:
                self._send_error_event(reply)
            else:
                self._send_error_body(reply)
        except GONE:
            self._note_departure()

    def _send_error_body(self, reply: Reply) -> None:
        self._headers_buffer = []  # of the 200 that mlx-lm had begun
        self._hold_headers = False
        self.close_connection = True
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
