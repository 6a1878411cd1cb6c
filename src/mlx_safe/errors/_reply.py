"""The HTTP answer to a request that a GPU fault, or a lack of memory, has ended.

The table is the project's HTTP contract. No text of an exception is in it, since
that may quote a prompt.
"""

from __future__ import annotations

from ._base import GPUError, OutOfMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["RETRY_AFTER_S", "Reply", "is_allocation_failure"]

RETRY_AFTER_S = 5

# Anthropic's API has a type for each status, and no code.
_ANTHROPIC_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


class Reply:
    """An error response. Immutable by convention; for any thread.

    Attributes:
        status: the HTTP status.
        type, code: as the OpenAI API has them, such as ``resource_exhausted_error``
            and ``metal_out_of_memory``.
        message: for the client's eyes.
        retry_after: seconds, for the header ``Retry-After``; None: do not retry.
        param: the field of the request that is wrong, or None.
    """

    __slots__ = ("code", "message", "param", "retry_after", "status", "type")

    def __init__(
        self,
        status: int,
        type: str,
        code: str,
        message: str,
        retry_after: int | None = None,
        param: str | None = None,
    ) -> None:
        self.status = status
        self.type = type
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.param = param

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.code}>"

    def error(self) -> dict[str, Any]:
        """The object under the key ``error``, as the OpenAI API has it."""
        found: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.retry_after is not None:
            found["retry_after"] = self.retry_after
        return found

    def openai(self) -> dict[str, Any]:
        """The whole body, as the OpenAI API has it."""
        return {"error": self.error()}

    def anthropic(self) -> dict[str, Any]:
        """The whole body, as the Anthropic API has it; 503 is ``overloaded_error``."""
        passing = "overloaded_error" if self.status == 503 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, passing)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where a later try makes sense."""
        after = self.retry_after
        return {} if after is None else {"Retry-After": str(after)}


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


def memory_reply(message: str) -> Reply:
    """503: there is too little memory at the moment."""
    return Reply(
        503, "resource_exhausted_error", "insufficient_memory", message, RETRY_AFTER_S
    )


def fault_reply(fault: GPUError) -> Reply:
    """503, or 500 where another try makes no sense."""
    if not (fault.retryable or fault.fatal):
        return Reply(
            500,
            "internal_server_error",
            "internal_generation_error",
            "The server failed while generating. The request was not completed.",
        )
    # What can be retried has one type; the code tells which fault it was.
    kind = "resource_exhausted" if fault.retryable else "service_unavailable"
    what = f"failed during generation ({fault.name})"
    if isinstance(fault, OutOfMemoryError):
        what = "ran out of memory during generation"
    return Reply(
        503,
        f"{kind}_error",
        fault.kind.slug,
        f"The GPU {what}. The request was not completed.",
        RETRY_AFTER_S,
    )
