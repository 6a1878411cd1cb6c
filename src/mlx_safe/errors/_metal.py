"""Metal's faults: IOGPU's codes and the exceptions made of them.

Codes are read as numbers (``error.userInfo[NSUnderlyingErrorKey].code``, or the
eight hex digits in the message), never from the wording, which differs between
systems and drivers.

Source of the codes: WebKit's ``Queue.mm`` and the reports of MLX users; Apple
publishes no list. Numbers that nobody has seen (1, 7, 0xc, 0xd, 0xf) are not
in the table and become a plain `MetalError`.
"""

from __future__ import annotations

from ._base import DeviceLostError, FaultKind, GPUError, OutOfMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .._fault import Fault

__all__ = [
    "FAULT_KINDS",
    "MetalAccessError",
    "MetalDeviceLostError",
    "MetalError",
    "MetalHangError",
    "MetalInnocentVictimError",
    "MetalInteractivityError",
    "MetalOutOfMemoryError",
    "MetalTimeoutError",
    "from_message",
    "is_metal_message",
    "kind_of",
]

_PREFIX = "kIOGPUCommandBufferCallbackError"


class MetalError(GPUError):
    """A command buffer completed with status error."""

    def __init__(
        self, message: str, *, code: int = -1, faults: Sequence[Fault] = ()
    ) -> None:
        super().__init__(message, kind=kind_of(code), faults=faults)


class MetalOutOfMemoryError(MetalError, OutOfMemoryError):
    """Code 8: resident memory went over what the GPU may use."""


class MetalTimeoutError(MetalError):
    """Code 2: a wait for the CPU, or for a busier process, took too long."""


class MetalHangError(MetalError):
    """Code 3: the GPU was found hanging in this work."""


class MetalInteractivityError(MetalError):
    """Code 0xe: one piece of work held up the display for too long."""


class MetalInnocentVictimError(MetalError):
    """Code 5: another process's fault forced a recovery of the GPU."""


class MetalAccessError(MetalError):
    """Codes 9, 0xa, 0xb, 0x10, 0x11: the work touched what it must not."""


class MetalDeviceLostError(MetalError, DeviceLostError):
    """Code 4: the driver ignores this process's work from now on."""


_CORRUPT = "Treat it as memory corruption: suspect a custom kernel or extension."

_KINDS = (
    FaultKind(
        0x2,
        _PREFIX + "Timeout",
        MetalTimeoutError,
        "metal_timeout",
        retryable=True,
        advice="Look for another process that keeps the GPU busy.",
    ),
    FaultKind(
        0x3,
        _PREFIX + "Hang",
        MetalHangError,
        "metal_hang",
        retryable=True,
        advice="If it comes back, later processes may need a reboot of the Mac.",
    ),
    FaultKind(
        0x4,
        _PREFIX + "SubmissionsIgnored",
        MetalDeviceLostError,
        "metal_device_lost",
        retryable=False,
        fatal=True,
        advice="Start the process again: no reset clears this.",
    ),
    FaultKind(
        0x5,
        _PREFIX + "InnocentVictim",
        MetalInnocentVictimError,
        "metal_innocent_victim",
        retryable=True,
        advice="Another process failed on the GPU.",
    ),
    FaultKind(
        0x6,
        _PREFIX + "BackgroundExecutionNotPermitted",
        MetalError,
        "metal_background_not_permitted",
        retryable=True,
        advice="The app must be in the foreground (iOS).",
    ),
    FaultKind(
        0x8,
        _PREFIX + "OutOfMemory",
        MetalOutOfMemoryError,
        "metal_out_of_memory",
        retryable=True,
        advice="Less prompt cache, shorter prompts, or, on a Mac, a higher "
        "iogpu.wired_limit_mb.",
    ),
    FaultKind(
        0x9,
        _PREFIX + "InvalidResource",
        MetalAccessError,
        "metal_invalid_resource",
        retryable=False,
        advice=_CORRUPT,
    ),
    FaultKind(
        0xA,
        _PREFIX + "InvalidInput",
        MetalAccessError,
        "metal_invalid_input",
        retryable=False,
        advice=_CORRUPT,
    ),
    FaultKind(
        0xB,
        _PREFIX + "PageFault",
        MetalAccessError,
        "metal_page_fault",
        retryable=False,
        advice=_CORRUPT,
    ),
    FaultKind(
        0xE,
        _PREFIX + "ImpactingInteractivity",
        MetalInteractivityError,
        "metal_interactivity",
        retryable=True,
        advice="Smaller prefill steps, or the display off.",
    ),
    FaultKind(
        0x10,
        _PREFIX + "ProtectionViolation",
        MetalAccessError,
        "metal_protection_violation",
        retryable=False,
        advice=_CORRUPT,
    ),
    FaultKind(
        0x11,
        _PREFIX + "StackOverflow",
        MetalAccessError,
        "metal_stack_overflow",
        retryable=False,
        advice=_CORRUPT,
    ),
)

FAULT_KINDS: Mapping[int, FaultKind] = {kind.code: kind for kind in _KINDS}


def kind_of(code: int) -> FaultKind:
    """The table's row for ``code``.

    A code that is not in the table is taken for retryable: the number of
    attempts is bounded, and nothing says that the process is lost.
    """
    kind = FAULT_KINDS.get(code)
    if kind is not None:
        return kind
    name = f"{_PREFIX}({code:#x})" if code >= 0 else f"{_PREFIX}(unknown)"
    return FaultKind(
        code,
        name,
        MetalError,
        "metal_error",
        retryable=True,
        advice="Please report this code, with the system's version.",
    )


def is_metal_message(message: str) -> bool:
    """Whether ``message`` is what MLX says of a failed command buffer.

    MLX 0.29 to 0.32 begin it with ``[METAL] Command buffer execution failed``;
    the driver's part is looked for as well, since MLX may wrap it.
    """
    return (
        "Command buffer execution failed" in message
        or "CommandBufferCallbackError" in message
    )


def from_message(message: str) -> FaultKind | None:
    """The row for what MLX says of a failed command buffer; None for other texts."""
    if not is_metal_message(message):
        return None
    from .. import _core

    return kind_of(_core.code_in_message(message))
