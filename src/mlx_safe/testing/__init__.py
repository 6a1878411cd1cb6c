"""Faults on demand, on any machine, without a GPU.

For the tests of this project and of any server that runs MLX:

    from mlx_safe import testing

    testing.attach(model)                      # count this model's calls
    with testing.inject("decode", step=3, code=8):
        ...                                    # the third decode step fails

A process that cannot be reached from the test takes its plan from the
environment: ``MLX_SAFE_INJECT="decode:3:8"`` (see `parse_plan`); `mlx-safe
serve` attaches to the model it loads when that is set.

A *generation step* is one call of the model. A call with one token in each row
is a ``"decode"`` step, one with more is a ``"prefill"`` step. The last token of
a prompt is read by the first decode step; that is how mlx-lm splits it.

Thread-safe.
"""

from __future__ import annotations

import os
import threading
import time

from .. import _core, _reports, errors
from ..errors import _cuda

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "Injection",
    "attach",
    "cuda_message",
    "fired",
    "inject",
    "metal_message",
    "parse_plan",
    "plan_from_environment",
    "record_fault",
    "run_command_buffer",
    "step",
    "throw_on_foreign_thread",
]

ENVIRONMENT = "MLX_SAFE_INJECT"
PHASES = ("prefill", "decode", "any")
ACTIONS = ("raise", "record", "terminate", "bug", "stall", "cuda")

# What Metal says before the bracket (WebKit's and MLX users' reports).
_WORDING = {
    0x2: "Caused GPU Timeout Error",
    0x3: "Caused GPU Hang Error",
    0x4: "Ignored (for causing prior/excessive GPU errors)",
    0x5: "Innocent Victim of GPU Error/Recovery",
    0x6: "Insufficient Permission (to submit GPU work from background)",
    0x8: "Insufficient Memory",
    0x9: "Invalid Resource",
    0xA: "Invalid Input",
    0xB: "Caused GPU Address Fault Error",
    0xE: "Impacting Interactivity",
    0x10: "Protection Violation",
    0x11: "Stack Overflow",
}


def metal_message(code: int) -> str:
    """The message of MLX (0.31.2) for a command buffer failed with ``code``."""
    kind = errors.kind_of(code)
    wording = _WORDING.get(code, "Internal Error")
    name = kind.name if code in errors.FAULT_KINDS else "Internal Error"
    return (
        f"[METAL] Command buffer execution failed: {wording} ({code & 0xFFFFFFFF:08x}:"
        f"{name})"
    )


def cuda_message(code: int) -> str:
    """What MLX's CUDA backend (0.31 to 0.32) says of error number ``code``.

    Memory is asked for by a call of its own; anything else is raised by whatever call
    comes next.
    """
    call = "cudaStreamSynchronize(stream)"
    if code == 2:
        call = "cudaMallocAsync(&data, size, stream)"
    return f"{call} failed: {_cuda.cuda_text(code)}"


def _check_code(code: int) -> None:
    """The log keeps a code in 32 bits, as IOKit's return values are."""
    if not isinstance(code, int) or not -(2**31) <= code < 2**31:
        raise ValueError(f"code must be a whole number of 32 bits, not {code!r}")


class Injection:
    """One planned fault, or a lasting one; what `inject` returns.

    A context manager that cancels itself on exit.

    Attributes:
        phase, step, code, persistent, action: as given to `inject`.
        seen: steps of that phase counted so far.
        fired: how often it has struck.
    """

    def __init__(
        self, phase: str, step: int, code: int, persistent: bool, action: str
    ) -> None:
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
        if action not in ACTIONS:
            raise ValueError(
                f"action must be one of {', '.join(ACTIONS)}, not {action!r}"
            )
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"step must be a whole number from 1 on, not {step!r}")
        _check_code(code)
        self.phase = phase
        self.step = step
        self.code = code
        self.persistent = persistent
        self.action = action
        self.seen = 0
        self.fired = 0

    def cancel(self) -> None:
        """Takes the plan back; more than once does no harm."""
        with _lock:
            if self in _plans:
                _plans.remove(self)

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        lasting = "persistent" if self.persistent else "once"
        return (
            f"<Injection {self.phase}:{self.step}:{self.code}:{lasting}:{self.action}"
            f" fired={self.fired}>"
        )

    def _is_due(self, phase: str) -> bool:
        if self.phase not in ("any", phase):
            return False
        self.seen += 1
        due = self.seen >= self.step if self.persistent else self.seen == self.step
        self.fired += due
        return due


_lock = threading.Lock()
_plans: list[Injection] = []
_fired = 0


def inject(
    phase: str = "decode",
    step: int = 1,
    code: int = 8,
    *,
    persistent: bool = False,
    action: str = "raise",
) -> Injection:
    """Plans a fault at the ``step``-th generation step from now, counted from 1.

    Args:
        phase: ``"prefill"``, ``"decode"`` or ``"any"``: which steps count.
        step: the one that fails; with ``persistent``, the first that does.
        code: IOGPU code; any number of 32 bits. With ``"cuda"`` a number of CUDA's,
            such as 2 (out of memory) or 719 (a failed kernel).
        action: ``"raise"`` raises MLX's own error from the step. ``"record"``
            puts a fault into the log and lets the step go on, as when MLX
            swallows the error. ``"terminate"`` throws on a foreign thread, as
            MLX 0.31.2 does without hooks: the process ends. ``"bug"`` raises a
            ValueError that has nothing to do with the GPU. ``"stall"`` lets the
            step hang for an hour. ``"cuda"`` raises what MLX's CUDA backend would.

    Raises:
        ValueError: an argument is none of the above.
    """
    injection = Injection(phase, step, code, persistent, action)
    with _lock:
        _plans.append(injection)
    return injection


def parse_plan(text: str) -> list[dict[str, Any]]:
    """Reads ``PHASE:STEP[:CODE[:once|persistent[:ACTION]]]``, comma-separated.

    Returns the keyword arguments for `inject`, one dict for each part.

    Raises:
        ValueError: with one line that names the part.
    """
    plans = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        phase, step, code, lasting, action = [*part.split(":"), *[""] * 4][:5]
        try:
            if part.count(":") > 4 or lasting not in ("", "once", "persistent"):
                raise ValueError
            plan = {
                "phase": phase,
                "step": int(step),
                "code": int(code or "8", 0),
                "persistent": lasting == "persistent",
                "action": action or "raise",
            }
            Injection(**plan)  # type: ignore[arg-type]
        except ValueError:
            raise ValueError(
                f"{ENVIRONMENT}: cannot read {part!r}: expected "
                "PHASE:STEP[:CODE[:once|persistent[:ACTION]]], such as decode:3:8"
            ) from None
        plans.append(plan)
    return plans


def plan_from_environment() -> list[Injection]:
    """Injects what ``MLX_SAFE_INJECT`` asks for; an empty list when unset."""
    return [inject(**plan) for plan in parse_plan(os.environ.get(ENVIRONMENT, ""))]


def step(phase: str) -> None:
    """Tells that a generation step begins; `attach` calls it for a model.

    A server with a loop of its own calls it where it would evaluate.

    Raises:
        RuntimeError: what MLX would raise, when a plan says so.
    """
    if not _plans:
        return
    global _fired
    with _lock:
        due = [plan for plan in _plans if plan._is_due(phase)]
        _fired += len(due)
    for plan in due:
        if plan.action == "record":
            record_fault(plan.code)
        elif plan.action == "terminate":
            throw_on_foreign_thread(metal_message(plan.code))
        elif plan.action == "stall":
            time.sleep(3600)
        elif plan.action == "cuda":
            raise RuntimeError(cuda_message(plan.code))
        elif plan.action == "bug":
            raise ValueError("injected: not a fault of the GPU")
        else:
            raise RuntimeError(metal_message(plan.code))


def fired() -> int:
    """How many faults have been injected so far, whatever became of them."""
    return _fired


def attach(model: Any, *, decode_width: int = 1) -> Any:
    """Counts the calls of ``model`` as generation steps, and returns it.

    Args:
        model: an ``mlx.nn.Module`` called as ``model(tokens, …)`` with
            ``tokens`` of shape (batch, length).
        decode_width: calls of at most this length are decode steps. With
            speculative decoding it is ``num_draft_tokens + 1``.

    The model keeps its class's name and stays an instance of it. Attaching
    twice counts once.

    Raises:
        TypeError: ``model`` cannot be called.
    """
    cls = type(model)
    if not callable(model):
        raise TypeError(f"attach() needs a model that can be called, not {model!r}")
    if getattr(cls, "_mlx_safe_attached", False):
        return model

    def call(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        step("decode" if tokens.shape[-1] <= decode_width else "prefill")
        return cls.__call__(self, tokens, *args, **kwargs)

    watched = type(
        cls.__name__,
        (cls,),
        {"__call__": call, "__module__": cls.__module__, "_mlx_safe_attached": True},
    )
    model.__class__ = watched
    return model


def record_fault(code: int = 8, message: str | None = None) -> int:
    """Puts a fault into the log from a native thread; returns its number.

    Nothing is raised: it is what remains of a fault that MLX swallowed.

    Raises:
        ValueError: ``code`` is not a number of 32 bits.
    """
    _check_code(code)
    _reports.watch_faults()
    return _core.testing_record_fault(
        code, metal_message(code) if message is None else message
    )


def run_command_buffer() -> None:
    """Runs one empty command buffer on Metal, as MLX runs its own.

    On a Mac, or on the simulated Metal that ``MLX_SAFE_METAL_RUNTIME`` names. As
    MLX 0.32 does where the regime is observe, else as MLX 0.31.2: without hooks
    a failure ends the process.

    Raises:
        RuntimeError: the command buffer failed, or there is no Metal.
    """
    _core.testing_run_command_buffer()


def throw_on_foreign_thread(message: str | None = None) -> None:
    """Throws ``std::runtime_error`` on a thread where nothing catches it.

    The process ends, by SIGABRT or as ``install(on_terminate=…)`` says.
    """
    _core.testing_throw_on_foreign_thread(
        metal_message(8) if message is None else message
    )
