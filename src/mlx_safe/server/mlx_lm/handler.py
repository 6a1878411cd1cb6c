"""mlx-lm's HTTP handler with an answer to every failure."""

from __future__ import annotations

import copy
import json
import logging
import time
import traceback
from email.message import Message as EmailMessage
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from mlx_lm.server import APIHandler

from .. import schema, strict_json
from ..answers import Answer
from ..body import Bodies, Hold, discard
from ..choices import GenerationEnded
from ..generator import Asked
from ..handover import Message
from ..logprobs import TOP_MAX
from ..metrics import CONTENT_TYPE
from ..model_names import DEFAULT
from ..replies import (
    EXPECTED,
    BadRequest,
    ModelNotFound,
    NotEnoughMemory,
    Reply,
    is_of_all,
    reply_for,
)
from ..request_file import State
from ..wire import Wire
from . import compat

__all__ = ["ProtectedHandler"]

log = logging.getLogger("mlx_safe.server")

# What a read or a write ends with when nobody is there, or reads on (`timeout`).
GONE = (ConnectionError, TimeoutError)
GET_ROUTES = ("/health", "/metrics", "/v1/models")

# mlx-lm tells with them how far it has read a prompt, after each step.
COMMENT = b": keepalive"


def _in_our_form(data: bytes) -> bytes:
    """``{"error": "text"}`` of mlx-lm, as the body that all other refusals have."""
    reply = reply_for(BadRequest(json.loads(data)["error"]))
    return json.dumps({"error": reply.error()}).encode()


class _Checked:
    """``rfile``, and what is read from it: a request that has been checked.

    mlx-lm's ``do_POST`` keeps what it has read until the answer is complete; here it
    is gone when it has been made into values.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, size: int) -> _Checked:
        return self

    def decode(self) -> str:
        text, self._text = self._text, ""
        return text


class _Refused(BaseException):
    """Carries ``error`` past ``except Exception`` in mlx-lm's ``do_POST``."""

    def __init__(self, error: BadRequest) -> None:
        super().__init__(str(error))
        self.error = error


class ProtectedHandler(Wire, APIHandler):  # type: ignore[misc]
    """One connection. Runs on a thread of its own."""

    response_generator: Any  # a `generator.ProtectedResponseGenerator`
    n = 1  # choices
    bodies = Bodies()  # of the server
    timeout = 120  # seconds for one read or write; a body has limits of its own
    keepalive_after_s = 5.0
    headers: Any = EmailMessage()  # none yet, when the request line cannot be read
    body: Any  # mlx-lm's: the request
    # http.server's own.
    path: str
    command = ""
    request_version: str
    rfile: Any
    _headers_buffer: list[bytes]
    _allow: str | None = None

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

    def heard(self) -> None:
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
        route = self.path.partition("?")[0]
        if route == "/metrics":
            body = self.response_generator.metrics.render()
            self._send_body(200, CONTENT_TYPE, body)
        elif route == "/health":
            self.handle_health_check()
        elif route == "/v1/models":
            self.handle_models_request()
        elif route.startswith("/v1/models/"):
            self._send_model(unquote(route.removeprefix("/v1/models/")))
        else:
            self._refuse_route()

    do_HEAD = do_GET  # `Wire` leaves the body out

    def _refuse_route(self) -> None:
        """There is no such path, or it is not for this method."""
        route = self.path.partition("?")[0]
        is_get = route in GET_ROUTES or route.startswith("/v1/models/")
        if is_get or route in schema.PATHS:
            self._allow = "GET, HEAD, OPTIONS" if is_get else "POST, OPTIONS"
            self._end(
                BadRequest(
                    f"The method is not allowed here; allowed are {self._allow}.",
                    status=405,
                    code="method_not_allowed",
                )
            )
        else:
            none = BadRequest("There is no such path.", status=404, code="not_found")
            self._end(none)

    do_PUT = do_PATCH = do_DELETE = _refuse_route

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """What http.server itself refuses, before there is a handler for it."""
        if self.request_version == "HTTP/0.9":
            self.request_version = self.protocol_version  # or there is no status line
        self.close_connection = True
        # Not ``message``, which quotes what the client has sent.
        phrase = HTTPStatus(code).phrase
        self._end(
            BadRequest(
                f"The request cannot be read ({phrase}).",
                status=code,
                code="_".join(phrase.lower().replace("-", " ").split()),
            )
        )
        discard(self.connection)

    def _listed(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created}

    def handle_models_request(self) -> None:
        names = self.response_generator.names.listed()
        body = {"object": "list", "data": [self._listed(name) for name in names]}
        self._send_json(200, body)

    def _send_model(self, name: str) -> None:
        """One model, by an id that the list has or by what it was started as."""
        if self.response_generator.names.knows(name):
            self._send_json(200, self._listed(name))
        else:
            self._end(ModelNotFound("There is no such model.", "model"))

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
        self.path = self.path.partition("?")[0]
        if self.path not in schema.PATHS:
            self._refuse_route()
            return
        rfile = self.rfile
        try:
            with self.bodies.holding() as hold:
                refused = self._take_request(hold)
                if refused is None:
                    super().do_POST()
                else:
                    if not isinstance(refused, GONE):
                        log.info("a request is refused: %s", refused)
                    self._end(refused)
        except _Refused as e:
            self._end(e.error)
        except Exception as e:
            if is_of_all(e):
                log.error("a request cannot be begun: %s", type(e).__name__)
            else:
                log.exception("a request failed before it was begun")
            self._end(e)  # handle_completion deals with its own
        finally:
            self.rfile = rfile
            self.body = None  # the handler itself is in cycles, and lives on

    def handle_expect_100(self) -> bool:
        return True  # not before `body` knows that it will read on

    def _take_request(self, hold: Hold) -> Exception | None:
        """Reads the request and checks it; mlx-lm is to read what has been found.

        Returns why not, without the frames that have the body: what an exception
        refers to lives until the garbage is collected.
        """
        try:
            raw = self.bodies.read(self, hold)
            self.body_was_read()
            with self.bodies.parsing(len(raw)):
                self.rfile = _Checked(self._checked(raw))
        except (BadRequest, NotEnoughMemory, *GONE) as e:
            return copy.copy(e).with_traceback(None)
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = "0"
        return None

    def _checked(self, raw: bytearray) -> str:
        """The request that ``raw`` is, as text for mlx-lm."""
        request = schema.read(self.path, raw, takes_xtc=compat.takes_xtc())
        self._check_images(request)
        return strict_json.dumps(request)

    def _check_images(self, request: dict[str, Any]) -> None:
        place = schema.takes_images(request)
        # Of another model nothing is known here.
        default = request.get("model", "default_model") == "default_model"
        provider = self.response_generator.model_provider
        if place and not compat.takes_images(provider) and default:
            raise strict_json.wrong(place, "is an image, which this model cannot read")

    def handle_chat_completions(self) -> Any:
        try:
            return super().handle_chat_completions()
        except Exception as e:
            if is_of_all(e):
                raise
            # mlx-lm (0.32) fetches images here, and tells the client why it cannot.
            log.info("an image cannot be fetched: %s", e)
            why = BadRequest("An image of the messages cannot be fetched.", "messages")
            raise _Refused(why) from e

    def validate_model_parameters(self) -> None:
        self.n = self.body.get("n", 1)
        super().validate_model_parameters()

    def _validate(self, name: str, *args: Any, **more: Any) -> None:
        if name == "top_logprobs":  # 11 for mlx-lm, 20 in the OpenAI API
            more["max_val"] = TOP_MAX
        super()._validate(name, *args, **more)

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        if self.requested_model == DEFAULT:
            self.requested_model: str = self.response_generator.names.default_name
        self._asked_at = time.monotonic()
        self.held.reach(State.RUNNING)
        try:
            super().handle_completion(request, stop_words)
        except Asked as asked:
            self._answer(asked)
        except Exception as e:
            self._end(e)

    def _answer(self, asked: Asked) -> None:
        try:
            Answer(self, asked).send()
        except GenerationEnded as e:
            self._end(e.error)
        except Exception as e:
            if not isinstance(e, (*GONE, *EXPECTED)):
                self._note_failure(e)
            self._end(e)
        else:
            self._count("completed")
            self.server.handover.tell_once(Message.WORKED)

    def _note_failure(self, exc: Exception) -> None:
        """Of what goes wrong here; the generation thread notes its own."""
        self.response_generator.metrics.failures.labels(reply_for(exc).code).inc()
        log.error(
            "the answer to %s could not be put together\n%s%s",
            self.request_id,
            # The places and the kind: a message may quote what was generated.
            "".join(traceback.format_tb(exc.__traceback__)),
            type(exc).__name__,
        )

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
        if self._allow is not None:
            self.send_header("Allow", self._allow)
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
