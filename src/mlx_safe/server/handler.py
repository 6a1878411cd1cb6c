"""mlx-lm's HTTP handler with an answer to every failure."""

from __future__ import annotations

import copy
import json
import logging
import time
from email.message import Message as EmailMessage
from typing import Any

from . import schema, strict_json
from .answers import Answer
from .asked import Asked
from .begun import Begun
from .body import Bodies, Hold
from .choices import GenerationEnded
from .endpoints import Endpoints
from .exchange import DISCONNECTED
from .handover import Message
from .logs import fields, of_exception
from .mlx_lm import compat
from .mlx_lm.bases import APIHandler
from .mlx_lm.protocols.opaque import Json
from .mlx_lm.protocols.requests import CompletionRequest
from .model_names import DEFAULT
from .replies import EXPECTED, BadRequest, NotEnoughMemory, is_of_all, reply_for
from .responses import error_body

__all__ = ["ProtectedHandler"]

log = logging.getLogger("mlx_safe.server")

# With such lines mlx-lm reports how far it has read a prompt, after each step.
COMMENT = b": keepalive"
# How an answer begins that mlx-lm itself refuses with.
MLX_LM_REFUSES = b'{"error": "'


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


class ProtectedHandler(Endpoints, APIHandler):
    """One connection. Runs on a thread of its own.

    Attributes:
        bodies: of the server; counts the memory of the bodies that are being read.
        keepalive_after_s: seconds until a stream without a token gets comments.
        n: how many choices the request asks for.
    """

    n = 1
    bodies = Bodies()
    keepalive_after_s = 5.0
    headers: Any = EmailMessage()  # none yet, when the request line cannot be read
    body: Any
    rfile: Any
    _headers_buffer: list[bytes]

    def begin(self) -> None:
        """Called before each request is read."""
        self.created = int(time.time())  # mlx-lm sets it once for each connection
        self._asked_at = time.monotonic()
        begun = self.held.begun
        if begun is not None:
            self.requested_model = begun.model or DEFAULT
            self._goes_on(begun)

    def _goes_on(self, begun: Begun) -> None:
        """Its events are those of one answer, whichever server sends them."""
        self.request_id, self.created = begun.id, begun.created

    # A stream's 200 waits for its first token: until then a failure can still be
    # answered with its own status, which clients know how to retry. Only one that
    # takes its time has comments before.

    def shape(self, data: bytes) -> bytes:
        """What of ``data``, written by mlx-lm, is sent."""
        if not data.startswith((COMMENT, MLX_LM_REFUSES)):
            return data  # as each token's
        if data.startswith(COMMENT):
            return data if self._is_late() else b""
        # It writes the body in one go.
        refused = BadRequest(json.loads(data)["error"])
        self.current_exchange().error = refused
        return error_body(reply_for(refused))

    def _is_late(self) -> bool:
        return time.monotonic() - self._asked_at >= self.keepalive_after_s

    def heard(self) -> None:
        """A token has been made that has no text yet, as those of tool calls."""
        if not self.stream or not self._is_late():
            return
        if time.monotonic() - self.wfile.sent_at >= max(self.keepalive_after_s, 1.0):
            self.wfile.write(COMMENT + b"\n\n")

    def _set_cors_headers(self) -> None:
        # The last that mlx-lm does before it ends the headers of any answer.
        super()._set_cors_headers()
        if self.command == "OPTIONS":
            # The "*" of mlx-lm does not cover it (Fetch standard), and clients in
            # browsers send a key whether one is asked for or not.
            self.send_header("Access-Control-Allow-Headers", "Authorization")
        request = self.response_generator.disconnects.request(
            getattr(self, "request_id", None)
        )
        for name, value in request.headers.items() if request else ():
            self.send_header(name, value)

    # -- a request ------------------------------------------------------------------

    def do_POST(self) -> None:
        """Answers a chat or a completion."""
        self.path = self.path.partition("?")[0]
        if self.path not in schema.PATHS:
            self.refuse_route()
            return
        rfile = self.rfile
        try:
            with self.bodies.holding() as hold:
                refused = self._take_request(hold)
                if refused is None:
                    super().do_POST()
                else:
                    self.end_with(refused)
        except _Refused as e:
            self.end_with(e.error)
        except Exception as e:
            # With more of a message than its kind, where that has no text in it.
            log.error(
                "a request failed before it was begun: %s",
                of_exception(e),
                exc_info=None if is_of_all(e) else e,
                extra=fields(id=getattr(self, "request_id", None)),
            )
            self.end_with(e)  # handle_completion deals with its own
        finally:
            self.rfile = rfile
            self.body = None  # the handler itself is in cycles, and lives on

    def handle_expect_100(self) -> bool:
        """Leaves ``Expect: 100-continue`` to `body`."""
        return True  # not before `body` knows that it will read on

    def _take_request(self, hold: Hold) -> Exception | None:
        """Reads the request and checks it, and has mlx-lm read the checked one.

        Returns why not, without the frames that have the body: what an exception
        refers to lives until the garbage is collected.
        """
        try:
            raw = self.bodies.read(self, hold)
            self.body_was_read()
            with self.bodies.parsing(len(raw)):
                self.rfile = _Checked(self._checked(raw))
        except (BadRequest, NotEnoughMemory, *DISCONNECTED) as e:
            return copy.copy(e).with_traceback(None)
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = "0"
        return None

    def _checked(self, raw: bytearray) -> str:
        """The request that ``raw`` is, as text for mlx-lm."""
        request = schema.read(self.path, raw, takes_xtc=compat.takes_xtc())
        self._check_images(request)
        return strict_json.dumps(request)

    def _check_images(self, request: Json) -> None:
        place = schema.takes_images(request)
        # Of another model nothing is known here.
        default = request.get("model", DEFAULT) == DEFAULT
        provider = self.response_generator.model_provider
        if place and not compat.takes_images(provider) and default:
            raise strict_json.wrong(place, "is an image, which this model cannot read")

    def handle_chat_completions(self) -> CompletionRequest:
        """mlx-lm's request of a chat. Raises `_Refused` for an image."""
        try:
            return super().handle_chat_completions()
        except Exception as e:
            if is_of_all(e):
                raise
            # mlx-lm (0.32) fetches images here, and answers with the reason itself.
            log.info("an image cannot be fetched: %s", type(e).__name__)
            why = BadRequest("An image of the messages cannot be fetched.", "messages")
            raise _Refused(why) from e

    def validate_model_parameters(self) -> None:
        """Takes ``n`` as well."""
        self.n = self.body.get("n", 1)
        super().validate_model_parameters()

    def _validate(self, name: str, *args: object, **more: object) -> None:
        if name == "top_logprobs":  # 11 for mlx-lm
            more["max_val"] = schema.TOP_LOGPROBS_MAX
        super()._validate(name, *args, **more)

    def handle_completion(
        self, request: CompletionRequest, stop_words: list[str]
    ) -> None:
        """Answers ``request``; raises nothing."""
        if self.requested_model == DEFAULT:
            self.requested_model = self.response_generator.names.default_name
        self._asked_at = time.monotonic()
        self.held.is_asked = True
        begun = self.held.begun
        if begun is not None:
            self._goes_on(begun)
            log.info(
                "a stream goes on that an earlier process had begun",
                extra=fields(id=begun.id),
            )
        elif self.stream:
            is_chunked = self.request_version == "HTTP/1.1"
            name = (self.request_id, self.requested_model, self.created)
            self.held.streams(self.connection, *name, is_chunked)
        try:
            super().handle_completion(request, stop_words)
        except Asked as asked:
            self._answer(asked)
        except Exception as e:
            self.end_with(e)

    def _answer(self, asked: Asked) -> None:
        try:
            Answer(self, asked).send()
        except GenerationEnded as e:
            self.end_with(e.error)
        except Exception as e:
            if not isinstance(e, (*DISCONNECTED, *EXPECTED)):
                self._note_failure(e)
            self.end_with(e)
        else:
            self.server.handover.tell_once(Message.WORKED)

    def _note_failure(self, exc: Exception) -> None:
        """Logs what goes wrong here; the generation thread logs its own."""
        self.response_generator.metrics.failures.labels(reply_for(exc).code).inc()
        log.error(
            "an answer could not be put together",
            exc_info=exc,
            extra=fields(id=self.request_id),
        )
