"""One failed command buffer, as a value. Imports nothing, so that all may use it."""

from __future__ import annotations

__all__ = ["Fault"]


class Fault:
    """One failed command buffer. Immutable.

    Attributes:
        number: its place in the epoch count, from 1.
        code: IOGPU code; -1 when none could be read.
        name: Apple's name for the code.
        message: as MLX words it; may be cut at 359 bytes.
        retryable, fatal: see `mlx_safe.errors.MetalError`.
        source: ``"metal"``, ``"terminate"`` or ``"injected"``.
        time: seconds since 1970.
        thread: the system's id of the thread that noticed it.
        buffer: number of the command buffer since install; 0: not known.
        queue: address of its command queue; 0: not known.
        label: label of the command buffer, or "".
        gpu_start, gpu_end: GPUStartTime and GPUEndTime in seconds
            (CFTimeInterval); 0.0: not known.
        tasks: names of the guards that it may belong to (`mlx_safe.guard`), the
            outermost first; several where they were open side by side.
    """

    __slots__ = (
        "buffer",
        "code",
        "fatal",
        "gpu_end",
        "gpu_start",
        "label",
        "message",
        "name",
        "number",
        "queue",
        "retryable",
        "source",
        "tasks",
        "thread",
        "time",
    )

    number: int
    code: int
    name: str
    message: str
    retryable: bool
    fatal: bool
    source: str
    time: float
    thread: int
    buffer: int
    queue: int
    label: str
    gpu_start: float
    gpu_end: float
    tasks: tuple[str, ...]

    def __init__(self, **fields: object) -> None:
        for name in Fault.__slots__:
            object.__setattr__(self, name, fields[name])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Fault is immutable, cannot set {name!r}")

    def __repr__(self) -> str:
        return f"<Fault {self.number}: {self.name} from {self.source}>"

    def __reduce__(self) -> tuple[object, ...]:
        return _fault_from, ({name: getattr(self, name) for name in Fault.__slots__},)


def _fault_from(fields: dict[str, object]) -> Fault:
    return Fault(**fields)
