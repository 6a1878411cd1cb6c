"""More than one rank (``mlx.launch``): all take the same steps, or all end.

mlx-lm shares each request with every rank, each runs the same loop, and the layers
of the model meet in collectives. A rank that takes another step than the others,
or none, leaves them waiting in a collective. Up to MLX 0.32.0, and with RDMA, they wait
for ever, even when its process is gone. Later the ring backend raises "connection to a
peer was lost". So whatever only one rank knows may not change its steps: either it is
shared first, or this process ends, and with it the others.

The group is made on the thread that generates (`Home`): MLX's streams, and with CUDA
what it computes with, belong to one thread (0.32). That a rank is gone, a connection
of our own tells (`lifeline`): with NCCL, whose kernels wait for ever, nothing else
does.

Nothing here imports MLX before `Home` is made: the supervisor's parent asks, too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue

from .. import _core
from .lifeline import Lifeline, address_of_first

__all__ = [
    *("AllStop", "Home", "is_first", "is_one_of_many", "signals_kept", "uses_nccl"),
]

# mlx.launch sets the first for ring, jaccl and nccl; Open MPI and MPICH theirs.
NCCL_VARIABLES = ("NCCL_HOST_IP", "NCCL_PORT", "MLX_RANK", "MLX_WORLD_SIZE")
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class AllStop:
    """Shared in place of a request: every rank ends its loop at the same turn."""


def is_first() -> bool:
    """Whether this process has the clients, as its environment says."""
    return next((os.environ[n] for n in RANK_VARIABLES if n in os.environ), "0") == "0"


def uses_nccl() -> bool:
    """Whether the ranks talk by NCCL, as MLX decides it (0.30 to 0.32). Imports MLX."""
    import mlx.core as mx

    named = all(os.environ.get(name) for name in NCCL_VARIABLES)
    return named and mx.default_device().type == mx.gpu and not mx.metal.is_available()


@contextmanager
def signals_kept() -> Iterator[None]:
    """Who has a signal has it again at the end of the block. MLX makes its group in it.

    To make it, of one rank as well, MLX (0.31, 0.32) loads libmpi, where there is one.
    Open MPI's hwloc may load OpenCL's drivers, and LLVM in one of them (pocl) takes
    most signals: SIGUSR1 from another process does nothing from then on, and neither
    does the first SIGSEGV.
    """
    kept = _core.KeptSignals()
    try:
        yield
    finally:
        kept.put_back()


class Home:
    """The thread in which the group of ranks is made, and which generates then.

    Attributes:
        lifeline: tells that a rank is gone; None where there is one rank only, or no
            address of the first is known.
    """

    def __init__(self) -> None:
        self.lifeline: Lifeline | None = None
        self._made = threading.Event()
        self._failed: Exception | None = None
        self._work: Queue[Callable[[], None]] = Queue()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="mlx-safe-ranks", daemon=True).start()

    def wait_made(self) -> None:
        """Waits until all ranks have met.

        Raises:
            Exception: they could not.
        """
        self._made.wait()
        if self._failed is not None:
            raise self._failed

    def run(self, work: Callable[[], None]) -> None:
        """Runs ``work`` there, once, and waits until it has ended. Any thread.

        Raises:
            Exception: what ``work`` has raised.
        """
        self._work.put(work)
        self._ended.wait()
        if self._failed is not None:
            raise self._failed

    def end(self) -> None:
        """All ranks end in good order from now on."""
        if self.lifeline is not None:
            self.lifeline.end()

    def _run(self) -> None:
        try:
            self._meet()
        except Exception as e:
            self._failed = e
        self._made.set()
        if self._failed is None:
            try:
                self._work.get()()
            except Exception as e:
                self._failed = e
        self._ended.set()

    def _meet(self) -> None:
        import mlx.core as mx

        with signals_kept():
            group = mx.distributed.init()
        address = address_of_first()
        if group.size() == 1 or address is None:
            return

        def share(numbers: list[int]) -> list[int]:
            found: list[int] = mx.distributed.all_sum(  # type: ignore[assignment]
                mx.array(numbers, mx.int32)
            ).tolist()
            return found

        self.lifeline = Lifeline(group.rank(), group.size(), address, share)


def is_one_of_many() -> bool:
    """Whether this process was started as a rank; its group may not exist yet."""
    return any(name in os.environ for name in RANK_VARIABLES)
