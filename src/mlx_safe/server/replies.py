"""What a client is told: one function from an exception to an answer.

The table is the HTTP contract of the project; nothing else in the server
chooses a status. No traceback and no text of an unexpected exception reaches a
client, since it may quote a prompt.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .. import errors

__all__ = [
    "EXPECTED",
    "BadRequest",
    "ContextTooLong",
    "ModelNotFound",
    "NotEnoughMemory",
    "Reply",
    "Unavailable",
    "is_allocation_failure",
    "reply_for",
]

RETRY_AFTER_S = 5
RETRY_AFTER_MAX_S = 60
# Of a refusal that lasts until the next server is there.
_restart_s = RETRY_AFTER_S


def a_start_takes(seconds: float) -> None:
    """What is told of a restart from now on, rounded up, from 1 to 60."""
    global _restart_s
    _restart_s = min(max(1, math.ceil(seconds)), RETRY_AFTER_MAX_S)


class BadRequest(Exception):
    """The request itself is wrong; the message may be shown to the client."""


class ModelNotFound(Exception):
    """The model that the request names cannot be loaded."""


class ContextTooLong(Exception):
    """The request can never be served here; the message says why."""


class NotEnoughMemory(Exception):
    """The request does not fit now, and would later; the message says why."""


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


class Reply(NamedTuple):
    """An error answer. ``retry_after`` is in seconds; None: do not retry."""

    status: int
    type: str
    code: str
    message: str
    retry_after: int | None = None

    def error(self) -> dict[str, Any]:
        """The object under the key ``error``, as the OpenAI API has it."""
        found: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": None,
            "code": self.code,
        }
        if self.retry_after is not None:
            found["retry_after"] = self.retry_after
        return found


def is_allocation_failure(exc: BaseException) -> bool:
    """Whether MLX (or Python) could not get memory, with no buffer failed.

    MLX's allocators begin their messages with ``[malloc``, ``[metal::malloc]``
    or, when the number of buffers is at its limit, ``[metal::malloc] Resource
    limit`` (0.29 to 0.32).
    """
    if isinstance(exc, MemoryError):
        return True
    return isinstance(exc, RuntimeError) and str(exc).startswith(
        ("[malloc", "[metal::malloc]", "[MetalAllocator", "[Allocator")
    )


def reply_for(exc: BaseException) -> Reply:
    """The answer to a client whose request ended with ``exc``."""
    if isinstance(exc, BadRequest):
        return Reply(400, "invalid_request_error", "invalid_request", str(exc))
    if isinstance(exc, ModelNotFound):
        # Not the reason, which tells of files and hosts; it is in the log.
        return Reply(
            404,
            "invalid_request_error",
            "model_not_found",
            "The model that the request names cannot be loaded.",
        )
    if isinstance(exc, ContextTooLong):
        return Reply(400, "invalid_request_error", "context_length_exceeded", str(exc))
    if isinstance(exc, NotEnoughMemory):
        return _memory_reply(str(exc))
    if isinstance(exc, Unavailable):
        after = _restart_s if exc.restarts else RETRY_AFTER_S
        return Reply(503, "service_unavailable_error", "unavailable", str(exc), after)
    fault = errors.from_exception(exc)
    if fault is not None and (fault.retryable or fault.fatal):
        return _fault_reply(fault)
    if is_allocation_failure(exc):
        return _memory_reply(
            "There is not enough memory for this request at the moment."
        )
    return Reply(
        500,
        "internal_server_error",
        "internal_generation_error",
        "The server failed while generating. The request was not completed.",
    )


def _memory_reply(message: str) -> Reply:
    return Reply(
        503,
        "resource_exhausted_error",
        "insufficient_memory",
        message,
        RETRY_AFTER_S,
    )


def _fault_reply(fault: errors.MetalError) -> Reply:
    # What can be retried has one type; the code tells which fault it was.
    kind = "resource_exhausted" if fault.retryable else "service_unavailable"
    what = f"failed during generation ({fault.name})"
    if isinstance(fault, errors.MetalOutOfMemoryError):
        what = "ran out of memory during generation"
    return Reply(
        503,
        f"{kind}_error",
        errors.kind_of(fault.code).slug,
        f"The GPU {what}. The request was not completed.",
        _restart_s if fault.fatal else RETRY_AFTER_S,
    )
