"""What is known of each libmlx.dylib, and what a change means for the hooks.

When a new version differs, the failing test prints its facts: read what changed and
what it means for the hooks (docs/metal.md) before they are recorded here.
"""

from __future__ import annotations

from dataclasses import dataclass

# Selectors whose users are recorded: how MLX learns of a fault and waits for an
# event. The others need only be sent by somebody.
RECORDED = (
    "waitUntilSignaledValue:timeoutMS:",
    "waitUntilCompleted",
    "signaledValue",
    "setSignaledValue:",
    "encodeSignalEvent:value:",
    "encodeWaitForEvent:value:",
    "status",
    "error",
)

# Selectors that no hook sees, so MLX must not begin to send them.
UNSEEN = {
    "addScheduledHandler:": "a handler that can throw and is not wrapped",
    "enqueue": "the order of buffers is taken from commit",
    "waitUntilScheduled": "a wait that is not held back",
    "notifyListener:atValue:block:": "a wait that is not held back",
    "newEvent": "an event that the CPU cannot read",
    "newSharedEventWithHandle:": "an event of a class that was never seen",
    "newMTL4CommandQueue": "Metal 4 queues are not hooked",
    "newMTL4CommandQueueWithDescriptor:error:": "Metal 4 queues are not hooked",
    "commit:count:": "Metal 4 commits are not hooked",
    "commit:count:options:": "Metal 4 commits are not hooked",
    "signalEvent:value:": "Metal 4 queues are not hooked",
    "waitForEvent:value:": "Metal 4 queues are not hooked",
    "addFeedbackHandler:": "Metal 4 tells of faults this way; it is not hooked",
}


@dataclass(frozen=True)
class Facts:
    """One version of libmlx.dylib.

    Attributes:
        throws_in: the completion handlers that throw.
        users: who sends each of `RECORDED`.
    """

    throws_in: tuple[str, ...]
    users: dict[str, tuple[str, ...]]


_EVALUATE = ("gpu::eval (lambda)", "gpu::finalize (lambda)")
_TO_0_31: dict[str, tuple[str, ...]] = {
    "waitUntilSignaledValue:timeoutMS:": (
        "Event::wait",
        "Event::wait (lambda)",
        "Fence::wait (lambda)",
    ),
    "waitUntilCompleted": ("gpu::synchronize",),
    "signaledValue": ("Event::is_signaled",),
    "setSignaledValue:": ("Event::signal (lambda)", "Fence::update (lambda)"),
    "encodeSignalEvent:value:": ("Event::signal", "Fence::update"),
    "encodeWaitForEvent:value:": ("Event::wait", "Fence::wait"),
    "status": ("gpu::check_error",),
    "error": ("gpu::check_error",),
}
_IN_0_31: dict[str, tuple[str, ...]] = {
    **_TO_0_31,
    "waitUntilCompleted": ("metal::CommandEncoder::synchronize",),
    "status": ("gpu::check_error", "metal::CommandEncoder::synchronize"),
    "error": ("gpu::check_error", "metal::CommandEncoder::synchronize"),
}
_FROM_0_32: dict[str, tuple[str, ...]] = {
    "waitUntilSignaledValue:timeoutMS:": (
        "Event::wait",
        "Event::wait (lambda)",
        "metal::EventImpl::wait",
    ),
    "waitUntilCompleted": ("metal::CommandEncoder::synchronize",),
    "signaledValue": ("Event::is_signaled",),
    "setSignaledValue:": ("Event::signal (lambda)", "metal::EventImpl::signal"),
    "encodeSignalEvent:value:": ("metal::CommandEncoder::signal_event",),
    "encodeWaitForEvent:value:": ("metal::CommandEncoder::wait_event",),
    "status": ("metal::CommandEncoder::commit (lambda)",),
    "error": ("metal::CommandEncoder::commit (lambda)",),
}

KNOWN: dict[str, Facts] = {
    "0.29.4": Facts(_EVALUATE, _TO_0_31),
    "0.30.6": Facts(_EVALUATE, _TO_0_31),
    "0.31.2": Facts(_EVALUATE, _IN_0_31),
    "0.32.0": Facts((), _FROM_0_32),
    "0.32.4": Facts((), _FROM_0_32),
}
