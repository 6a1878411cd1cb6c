"""mlx-lm's HTTP handler with an answer to every failure."""

from __future__ import annotations

import copy
import json
import logging
import time
from email.message import Message
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mlx_lm.server import APIHandler

from . import compat, schema, strict_json
from .body import Bodies, Hold, discard, is_announced
from .generator import Answered, ProtectedResponseGenerator
from .metrics import CONTENT_TYPE
from .recorder import name_request
from .replies import BadRequest, ModelNotFound, NotEnoughMemory, Reply, reply_for

__all__ = ["ProtectedHandler"]

log = logging.getLogger("mlx_safe.server")

# What a read or a write ends with when nobody is there, or reads on (`timeout`).
GONE = (ConnectionError, TimeoutError)
GET_ROUTES = ("/health", "/metrics", "/v1/models")


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


class ProtectedHandler(APIHandler):  # type: ignore[misc]
    """One request. Runs on a thread of its own."""

    response_generator: ProtectedResponseGenerator
    bodies = Bodies()  # of the server
    timeout = 120  # seconds for one read or write; a body has limits of its own
    headers: Any = Message()  # none yet, when the request line cannot be read
    # http.server's own.
    path: str
    request_version: str
    rfile: Any
    _headers_buffer: list[bytes]

    def setup(self) -> None:
        self._hold_headers = False
        self._logged_code: Any = None
        self._allow: str | None = None
        self.command = ""
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
        self._ignore_body()
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

    do_HEAD = do_GET  # `_send_body` leaves the body out

    def do_OPTIONS(self) -> None:
        self._ignore_body()
        super().do_OPTIONS()

    def _refuse_route(self) -> None:
        """There is no such path, or it is not for this method."""
        self._ignore_body()
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

    def _ignore_body(self) -> None:
        """What may follow is not read, so the connection ends here."""
        if is_announced(self.headers):
            self.close_connection = True

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """What http.server itself refuses, before there is a handler for it."""
        if self.request_version == "HTTP/0.9":
            self.request_version = self.protocol_version  # or there is no status line
        self.close_connection = True
        self.bytes_sent = 0
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

    def _models(self) -> list[dict[str, Any]]:
        """What mlx-lm lists, which sends it at once."""
        kept = self.wfile, self.path
        self.wfile, self.path = BytesIO(), "/v1/models"
        try:
            super().handle_models_request()
            listed = json.loads(self.wfile.getvalue().partition(b"\r\n\r\n")[2])
            found: list[dict[str, Any]] = listed["data"]
        except Exception as e:
            # mlx-lm has sent its 200 and then found no cache of the hub here.
            log.info("no models of the hub are listed: %s", e)
            self._headers_buffer = []
            model = self.response_generator.cli_args.model
            listed = {"id": model, "object": "model", "created": self.created}
            found = [listed] if model else []
        finally:
            self.wfile, self.path = kept
        return found

    def handle_models_request(self) -> None:
        self._send_json(200, {"object": "list", "data": self._models()})

    def _send_model(self, name: str) -> None:
        """One model, by the id that the list has or by what it was started as."""
        given = self.response_generator.cli_args.model
        for model in self._models():
            # The list has the path that a relative one stands for.
            if name == model["id"] or (
                name == given and model["id"] == str(Path(given).resolve())
            ):
                self._send_json(200, {**model, "id": name})
                return
        self._end(ModelNotFound(name))

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
        rfile, self._unread = self.rfile, True
        try:
            with self.bodies.holding() as hold:
                refused = self._take_request(hold)
                if refused is None:
                    super().do_POST()
                else:
                    if not isinstance(refused, GONE):
                        log.info("a request is refused: %s", refused)
                    self._end(refused)
        except Answered as e:
            self._end(e.error)
        except Exception as e:
            log.exception("a request failed before it was begun")
            self._end(e)  # handle_completion deals with its own
        finally:
            self.rfile = rfile
            self.body = None  # the handler itself is in cycles, and lives on
        if self._unread:
            discard(self.connection)

    def handle_expect_100(self) -> bool:
        return True  # not before `body` knows that it will read on

    def _take_request(self, hold: Hold) -> Exception | None:
        """Reads the request and checks it; mlx-lm is to read what has been found.

        Returns why not, without the frames that have the body: what an exception
        refers to lives until the garbage is collected.
        """
        try:
            raw = self.bodies.read(self, hold)
            self._unread = False
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
            # mlx-lm (0.32) fetches images here, and tells the client why it cannot.
            log.info("an image cannot be fetched: %s", e)
            why = BadRequest("An image of the messages cannot be fetched.", "messages")
            raise Answered(why) from e

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        name_request(request, self.request_id, self.path)
        try:
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
        self._headers_buffer = []
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
        if self._allow is not None:
            self.send_header("Allow", self._allow)
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.wfile.flush()
