"""Plans of faults, and what strikes when one is due."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from .. import _core, _reports, errors
from ..errors import _cuda

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = [
    "Injection",
    "NeverFired",
    "cuda_message",
    "fired",
    "inject",
    "metal_message",
    "parse_plan",
    "record_fault",
    "run_command_buffer",
    "step",
    "throw_on_foreign_thread",
]

ENVIRONMENT = "MLX_SAFE_INJECT"
LOG = "MLX_SAFE_INJECT_LOG"
METAL_RUNTIME = "MLX_SAFE_METAL_RUNTIME"
PHASES = ("prefill", "decode", "any")
ACTIONS = ("raise", "record", "terminate", "bug", "stall", "cuda", "metal")

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


class NeverFired(AssertionError):
    """A planned fault has not struck: what was to be tested was not."""


class Injection:
    """One planned fault, or a lasting one; what `inject` returns.

    A context manager that cancels itself on exit. It raises `NeverFired` then if the
    fault has not struck, unless the block has raised something itself.

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

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.cancel()
        if kind is None and not self.fired:
            raise NeverFired(self.why_not())

    def __str__(self) -> str:
        """As `parse_plan` reads it."""
        lasting = "persistent" if self.persistent else "once"
        return f"{self.phase}:{self.step}:{self.code}:{lasting}:{self.action}"

    def __repr__(self) -> str:
        return f"<Injection {self} fired={self.fired}>"

    def why_not(self) -> str:
        """One line on a plan that has not struck: what was counted meanwhile."""
        kind = "generation" if self.phase == "any" else self.phase
        said = f"{self} never fired: {self.seen} {kind} steps were counted"
        if not self.seen and not attached:
            said += "; no model is attached here: see mlx_safe.testing.attach"
        return said

    def _is_fatal(self) -> bool:
        if self.action == "cuda":
            return errors.cuda_kind_of(self.code).fatal
        return self.action == "raise" and errors.kind_of(self.code).fatal

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
# Names of the classes of the models whose calls are counted; `models` appends.
attached: list[str] = []


def log(event: str, what: object) -> None:
    """Adds ``event``, this process's id and ``what`` to ``MLX_SAFE_INJECT_LOG``."""
    with opened_log() as fd:
        if fd is not None:
            # One write: several processes may have the file open.
            os.write(fd, f"{event} {os.getpid()} {what}\n".encode())


@contextlib.contextmanager
def opened_log() -> Iterator[int | None]:
    """``MLX_SAFE_INJECT_LOG``, to be written at its end; None: it is not set.

    Raises:
        OSError: it cannot be written.
    """
    path = os.environ.get(LOG)
    if not path:
        yield None
        return
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


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
            ``"metal"`` fails a command buffer of the simulated Metal within the
            step, by `run_command_buffer`: without hooks that ends the process, as
            with MLX 0.31.2.

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
        log("fired", plan)
        if plan.action == "record":
            record_fault(plan.code)
        elif plan.action == "terminate":
            throw_on_foreign_thread(metal_message(plan.code))
        elif plan.action == "stall":
            time.sleep(3600)
        elif plan.action == "cuda":
            raise RuntimeError(cuda_message(plan.code))
        elif plan.action == "metal":
            _fail_on_metal(plan.code)
        elif plan.action == "bug":
            raise ValueError("injected: not a fault of the GPU")
        else:
            raise RuntimeError(metal_message(plan.code))


def loses_gpu() -> bool:
    """Whether a plan that has struck would have lost the GPU; it works in truth."""
    with _lock:
        return any(plan.fired and plan._is_fatal() for plan in _plans)


def fired() -> int:
    """How many faults have been injected so far, whatever became of them."""
    return _fired


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


def _fail_on_metal(code: int) -> None:
    path = os.environ.get(METAL_RUNTIME)
    if not path:
        raise RuntimeError(
            'the action "metal" needs the simulated Metal: install mlx-safe-metalsim, '
            f"and start the program with {METAL_RUNTIME} as its environment() has it"
        )
    import ctypes

    fail = ctypes.CDLL(path).metalsim_plan_fail
    fail.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint32)
    fail(1, code, 0, 0)
    _core.testing_run_command_buffer()


def throw_on_foreign_thread(message: str | None = None) -> None:
    """Throws ``std::runtime_error`` on a thread where nothing catches it.

    The process ends, by SIGABRT or as ``install(on_terminate=…)`` says.
    """
    _core.testing_throw_on_foreign_thread(
        metal_message(8) if message is None else message
    )
