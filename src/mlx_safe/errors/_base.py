"""What the errors of every GPU backend have in common."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._fault import Fault

__all__ = ["DeviceLostError", "FaultKind", "GPUError", "OutOfMemoryError"]


class GPUError(RuntimeError):
    """The GPU failed a piece of work; the base of every backend's errors.

    A `RuntimeError`, so that code which catches MLX's own error keeps working.

    Attributes:
        kind: the row of the backend's table that says what follows.
        code: the backend's number; -1 when none could be read.
        name: the backend's name for it, such as
            ``kIOGPUCommandBufferCallbackErrorOutOfMemory`` or
            ``cudaErrorMemoryAllocation``.
        retryable: the same work may succeed when it is done again. What the
            failed work was to write must be computed anew.
        fatal: this process gets no more work done on the GPU.
        faults: tuple of `mlx_safe.Fault`, oldest first; empty when the error
            was made of an exception that MLX raised by itself.
        tasks: tuple of the names of the guards that ``faults`` may belong to; without
            faults, of those around the `guard` that has raised this.
    """

    def __init__(
        self, message: str, *, kind: FaultKind, faults: Sequence[Fault] = ()
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = kind.code
        self.name = kind.name
        self.retryable = kind.retryable
        self.fatal = kind.fatal
        self.faults: tuple[Fault, ...] = tuple(faults)
        self._around: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        of_faults = dict.fromkeys(name for f in self.faults for name in f.tasks)
        return tuple(of_faults) if self.faults else self._around

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (type(self), str(self), self.code, self.faults)
        return _rebuild, arguments, {"_around": self._around}


def _rebuild(
    cls: type[GPUError], message: str, code: int, faults: tuple[Fault, ...]
) -> GPUError:
    # Each backend's class finds the row by its code.
    return cls(message, code=code, faults=faults)  # type: ignore[call-arg]


class OutOfMemoryError(GPUError):
    """The GPU had too little memory for the work."""


class DeviceLostError(GPUError):
    """This process gets no more work done on the GPU: it must be replaced."""


class FaultKind:
    """One row of the table. Immutable.

    Attributes:
        code, name: as in `GPUError`. error: exception class.
        retryable, fatal: as in `GPUError`.
        slug: the ``code`` of the JSON error that a server sends.
        advice: one sentence for the reader of the log.
    """

    __slots__ = ("advice", "code", "error", "fatal", "name", "retryable", "slug")

    def __init__(
        self,
        code: int,
        name: str,
        error: type[GPUError],
        slug: str,
        *,
        retryable: bool,
        fatal: bool = False,
        advice: str,
    ) -> None:
        self.code = code
        self.name = name
        self.error = error
        self.slug = slug
        self.retryable = retryable
        self.fatal = fatal
        self.advice = advice

    def make(self, message: str, faults: Sequence[Fault] = ()) -> GPUError:
        """The exception for the failure of ``message``."""
        return _rebuild(self.error, message, self.code, tuple(faults))

    def __repr__(self) -> str:
        return f"FaultKind({self.code:#x}, {self.name})"
