"""The tables of GPU faults, and the exceptions made of them.

One table for each backend (`FAULT_KINDS` for Metal, `CUDA_FAULT_KINDS`) says what each
number is called and which exception it becomes. It also says whether the work can be
tried again and whether the process can go on. `GPUError`, `OutOfMemoryError` and
`DeviceLostError` are the bases of both families: catch these to serve either.

All of this may be used from any thread.
"""

from __future__ import annotations

from . import _cuda, _metal
from ._base import DeviceLostError, FaultKind, GPUError, OutOfMemoryError
from ._cuda import (
    CUDA_FAULT_KINDS,
    CudaDeviceLostError,
    CudaError,
    CudaOutOfMemoryError,
    cuda_kind_of,
)
from ._metal import (
    FAULT_KINDS,
    MetalAccessError,
    MetalDeviceLostError,
    MetalError,
    MetalHangError,
    MetalInnocentVictimError,
    MetalInteractivityError,
    MetalOutOfMemoryError,
    MetalTimeoutError,
    is_metal_message,
    kind_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._fault import Fault
    from ._reply import Reply, is_allocation_failure

__all__ = [
    "CUDA_FAULT_KINDS",
    "FAULT_KINDS",
    "CudaDeviceLostError",
    "CudaError",
    "CudaOutOfMemoryError",
    "DeviceLostError",
    "FaultKind",
    "GPUError",
    "MetalAccessError",
    "MetalDeviceLostError",
    "MetalError",
    "MetalHangError",
    "MetalInnocentVictimError",
    "MetalInteractivityError",
    "MetalOutOfMemoryError",
    "MetalTimeoutError",
    "OutOfMemoryError",
    "Reply",
    "cuda_kind_of",
    "from_exception",
    "from_faults",
    "is_allocation_failure",
    "is_metal_message",
    "kind_in_message",
    "kind_of",
    "reply_for",
]

# For servers: imported when one asks for them.
_OF_REPLIES = ("Reply", "is_allocation_failure")


def __getattr__(name: str) -> object:
    if name in _OF_REPLIES:
        from . import _reply

        return getattr(_reply, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kind_in_message(message: str) -> FaultKind | None:
    """The row that MLX's text ``message`` names; None when it is of no GPU fault."""
    return _metal.from_message(message) or _cuda.from_message(message)


def from_exception(exc: BaseException) -> GPUError | None:
    """The `GPUError` that ``exc`` stands for, or None if it is another error.

    ``exc`` itself when it is one. Otherwise a new one, classified by the number
    in the message (Metal) or by the text that CUDA has for its number; chain it with
    ``raise … from exc``.
    """
    if isinstance(exc, GPUError):
        return exc
    if not isinstance(exc, RuntimeError):
        return None
    message = str(exc)
    kind = kind_in_message(message)
    return None if kind is None else kind.make(message)


def reply_for(exc: BaseException) -> Reply | None:
    """The error response to a request that ``exc`` has ended.

    For a fault of the GPU, MLX's own text included, and for a failed allocation; None
    for any other exception, which is the server's own affair. 503 with a
    ``retry_after`` where the same request may succeed later, 500 where it will not.
    """
    from ._reply import fault_reply, is_allocation_failure, memory_reply

    fault = from_exception(exc)
    if fault is not None:
        return fault_reply(fault)
    if is_allocation_failure(exc):
        return memory_reply(
            "There is not enough memory for this request at the moment."
        )
    return None


def from_faults(faults: Sequence[Fault]) -> MetalError:
    """One error for ``faults`` (at least one, oldest first), which are Metal's.

    The worst decides the class: a fatal one, else the first that cannot be
    retried, else the first of all.
    """
    worst = next((f for f in faults if f.fatal), None)
    worst = worst or next((f for f in faults if not f.retryable), faults[0])
    message = worst.message or f"[METAL] Command buffer execution failed: {worst.name}"
    if len(faults) > 1:
        message += f" (and {len(faults) - 1} more faults)"
    kind = kind_of(worst.code)
    assert issubclass(kind.error, MetalError)
    return kind.error(message, code=worst.code, faults=faults)
