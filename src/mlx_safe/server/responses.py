"""Bodies of answers: JSON, and errors in the form of the OpenAI API.

Knows nothing of mlx-lm. Every status and text of an error comes from `replies`.
"""

from __future__ import annotations

import contextlib
import json
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from .access import Access, challenge, refusal_body
from .begun import DONE
from .body import discard
from .exchange import DISCONNECTED, Exchange
from .mlx_lm.protocols.opaque import Json
from .replies import BadRequest, Reply, reply_for
from .service import Service
from .wire import Wire

__all__ = ["DISCONNECTED", "Responses", "error_body"]


def error_body(reply: Reply) -> bytes:
    """``{"error": …}`` as the OpenAI API has it, in UTF-8."""
    return json.dumps({"error": reply.error()}).encode()


class Responses(Wire):
    """Sends the answers of one connection. Runs on a thread of its own."""

    response_generator: Service
    # Of the request that is being answered, as soon as its body has been read.
    request_id: str
    requested_model: str
    created: int
    stream: bool
    timeout = 120  # seconds for one read or write; a body has limits of its own
    # http.server's own.
    command = ""
    request_version: str
    _allow: str | None = None
    _challenge: str | None = None
    may_ask = Access()

    if TYPE_CHECKING:

        def _set_cors_headers(self) -> None:
            """The last headers of any answer; another base class has it."""

    def parse_request(self) -> bool:
        """Reads the head; False when it was refused, also for want of a key."""
        if not super().parse_request():
            return False
        path = self.path.partition("?")[0]
        peer = str(self.client_address[0])
        refused = self.may_ask.refusal(self.command, path, self.headers, peer)
        if refused is None:
            return True
        if refused.status == 401:
            self._challenge = challenge(path)
        exchange = self.current_exchange()
        exchange.error, exchange.client = refused, peer
        body = refusal_body(refused, path, self.headers)
        with contextlib.suppress(*DISCONNECTED):
            self.send_body(refused.status, "application/json", body)
        return False

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answers what http.server refuses before it has found a method for it.

        Args:
            code: the HTTP status.
            message, explain: not sent, since they quote the client.
        """
        if self.request_version == "HTTP/0.9":
            self.request_version = self.protocol_version  # or there is no status line
        self.close_connection = True
        phrase = HTTPStatus(code).phrase
        self.end_with(
            BadRequest(
                f"The request cannot be read ({phrase}).",
                status=code,
                code="_".join(phrase.lower().replace("-", " ").split()),
            )
        )
        discard(self.connection)

    def end_with(self, exc: Exception) -> None:
        """Answers a request that has ended with ``exc``.

        The next server answers instead when this one is about to be replaced and
        nothing has been sent. Raises nothing.
        """
        exchange = self.current_exchange()
        exchange.error = exc
        if isinstance(exc, DISCONNECTED):
            self.abandon()
        elif self.response_generator.health.restarts and self.leave_to_the_next():
            exchange.is_handed_over = True
        else:
            self._send_failure(exc)

    def current_exchange(self) -> Exchange:
        if self.exchange is None:
            self.exchange = Exchange()
        return self.exchange

    def ended(self, exchange: Exchange) -> None:
        """Logs and counts it."""
        if not exchange.is_quiet:
            exchange.id = getattr(self, "request_id", "-")
            self.response_generator.metrics.count(exchange)
            exchange.log()

    def _send_failure(self, exc: Exception) -> None:
        reply = reply_for(exc)
        try:
            if not self.wfile.sent:
                self.drop_head()  # of the 200 that mlx-lm had begun
                self.send_body(
                    *(reply.status, "application/json", error_body(reply)),
                    retry_after=reply.retry_after,
                )
            elif self.held.begun is not None or self.stream:
                self._send_error_event(reply)
            else:
                self.abandon()
        except DISCONNECTED as e:
            self.current_exchange().error = e
            self.abandon()

    def _send_error_event(self, reply: Reply) -> None:
        event = {
            "id": getattr(self, "request_id", None),
            "object": "error",
            "model": getattr(self, "requested_model", None),
            "created": getattr(self, "created", int(time.time())),
            "error": reply.error(),
        }
        self.held.note(DONE)
        self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())
        self.wfile.flush()
        self.current_exchange().is_error_event = True

    def send_json(self, status: int, value: Json) -> None:
        """Answers with ``value``. Raises OSError when the client has left."""
        self.send_body(status, "application/json", json.dumps(value).encode())

    def send_body(
        self,
        status: int,
        content_type: str,
        body: bytes,
        retry_after: int | None = None,
    ) -> None:
        """Answers with ``body``.

        Args:
            retry_after: seconds for the header of that name; None: no header.

        Raises:
            OSError: the client has left.
        """
        if self.wfile.sent:  # of a stream that an earlier server had begun
            self.abandon()
            return
        self.send_response(status)
        self.send_header("Content-type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        if self._allow is not None:
            self.send_header("Allow", self._allow)
        if self._challenge is not None:
            self.send_header("WWW-Authenticate", self._challenge)
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
