"""Error responses: one function from an exception to an answer.

The table is the HTTP contract of the project; nothing else in the server
chooses a status. No traceback and no text of an unexpected exception reaches a
client, since it may quote a prompt.
"""

from __future__ import annotations

import math

from .. import errors
from ..errors import Reply, is_allocation_failure
from ..errors._reply import RETRY_AFTER_S, memory_reply

__all__ = [
    "EXPECTED",
    "BadRequest",
    "BodyCut",
    "ContextTooLong",
    "ModelNotFound",
    "NotANumber",
    "NotEnoughMemory",
    "Reply",
    "Unavailable",
    "is_allocation_failure",
    "is_of_all",
    "reply_for",
]

RETRY_AFTER_MAX_S = 60
# Of a refusal that lasts until the next server is there.
_restart_s = RETRY_AFTER_S


def a_start_takes(seconds: float) -> None:
    """``Retry-After`` of a restart from now on: ``seconds`` rounded up, 1 to 60."""
    global _restart_s
    _restart_s = min(max(1, math.ceil(seconds)), RETRY_AFTER_MAX_S)


class BadRequest(Exception):
    """The request itself is wrong; the message may be shown to the client.

    Args:
        param: the field of the request that is wrong, by the API's own name, such
            as ``messages[0].content``; None: it is about no field.
        status, code: of the answer, where it is not a plain 400.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str = "invalid_request",
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class BodyCut(BadRequest):
    """Its client left, or said no more, in the midst of the body.

    It is answered, as one that has closed its side only may still read.
    """


class ModelNotFound(Exception):
    """There is no such model, or it cannot be loaded; the message may be shown.

    ``param`` is the field that names it: ``model``, ``adapters``, ``draft_model``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(Exception):
    """The request can never be served here; the message says why.

    ``param`` is the field that is too long; None: not one alone.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotEnoughMemory(Exception):
    """The request does not fit now, and would later; the message says why."""


class NotANumber(Exception):
    """The model computes no numbers; the message may be shown to the client."""


class Unavailable(Exception):
    """The server refuses work for now; the message says why.

    Attributes:
        restarts: until another server has taken its place.
    """

    def __init__(self, message: str | None, *, restarts: bool = False) -> None:
        super().__init__(message)
        self.restarts = restarts


# What a request may end with that is no failure of the server.
EXPECTED = (BadRequest, ContextTooLong, ModelNotFound, NotEnoughMemory)


def is_of_all(exc: BaseException) -> bool:
    """Whether ``exc`` is about the GPU or memory, and not about one request.

    Whatever was being done, it may pass: it takes the way of a fault, and is never
    the request's own mistake.
    """
    return errors.from_exception(exc) is not None or is_allocation_failure(exc)


def reply_for(exc: BaseException) -> Reply:
    """The answer to a client whose request ended with ``exc``."""
    if isinstance(exc, BadRequest):
        return Reply(
            exc.status, "invalid_request_error", exc.code, str(exc), param=exc.param
        )
    if isinstance(exc, ModelNotFound):
        return Reply(
            404,
            "invalid_request_error",
            "model_not_found",
            str(exc),
            param=exc.param,
        )
    if isinstance(exc, ContextTooLong):
        return Reply(
            400,
            "invalid_request_error",
            "context_length_exceeded",
            str(exc),
            param=exc.param,
        )
    if isinstance(exc, NotEnoughMemory):
        return memory_reply(str(exc))
    if isinstance(exc, NotANumber):
        return Reply(500, "internal_server_error", "model_not_a_number", str(exc))
    if isinstance(exc, Unavailable):
        after = _restart_s if exc.restarts else RETRY_AFTER_S
        return Reply(503, "service_unavailable_error", "unavailable", str(exc), after)
    fault = errors.from_exception(exc)
    found = errors.reply_for(fault or exc)
    if found is None:
        return Reply(
            500,
            "internal_server_error",
            "internal_generation_error",
            "The server failed while generating. The request was not completed.",
        )
    if fault is not None and fault.fatal:
        found.retry_after = _restart_s
    return found
