"""What of MLX's state a failure can leave unsound, and how it is repaired.

Looked at for MLX 0.31.2 and 0.32.4, each by a test (`test_thread_state.py`):

- the random state: a function that is compiled for it (mlx-lm's samplers are) and
  raises while it is traced leaves its tracers there. From then on everything that draws
  raises. A new seed mends it.
- the default device and stream: a generator that is dropped inside ``mx.stream``
  leaves the block when it is collected, which may be later, and in another order.
  Nothing of mlx-lm's is in a cycle when its frames are cleared, so that nothing waits
  for the collector. Whatever it finds later, this thread's are set anew at each turn.
- errors that a stream has stored (0.32): a wait raises them, each once.
- compiled functions: one that raised is traced anew when it is called again.
"""

from __future__ import annotations

import logging
import os

import mlx.core as mx

from . import _core, errors
from ._exceptions import clear_frames

__all__ = ["ThreadState", "drop_failed", "make_sound", "seed_anew"]

log = logging.getLogger("mlx_safe")

# Errors still pending on MLX's streams are raised by the next waits, each once
# (MLX 0.32); this many are fetched before the state is taken for clean.
PENDING_ERRORS_MAX = 8


def seed_anew() -> None:
    """Gives the calling thread a random state that cannot be predicted."""
    mx.random.seed(int.from_bytes(os.urandom(8), "little"))


def drop_failed(exc: Exception) -> None:
    """Frees what the frames of ``exc`` hold: arrays of the work that has failed.

    After a wait: MLX 0.32 raises a stored error without one, and the GPU may still
    write to their memory.
    """
    _core.metal_wait_for_skipped()
    clear_frames(exc)


def make_sound(*streams: mx.Stream, draws: bool = True) -> None:
    """After a failure, when what it has spoilt is gone: the next work may begin.

    Args:
        streams: whose stored errors are fetched, beside the default stream's.
        draws: something may have been drawing: the random state is made anew.

    Raises:
        GPUError: fatal: nothing can be computed any more.
    """
    _fetch_pending_errors(*streams)
    if draws:
        seed_anew()
    mx.clear_cache()


class ThreadState:
    """MLX's state as the thread that makes this has it. Used by that thread only."""

    def __init__(self) -> None:
        self._device = mx.default_device()
        self._stream = mx.default_stream(self._device)

    def restore(self) -> None:
        """After a failure: as it was, with nothing pending.

        Raises:
            DeviceLostError: nothing can be computed any more.

        Not by a search for what is left: ``gc.collect()`` looks at all that Python
        has imported, a quarter of a second where that is a lot.
        """
        self.hold()
        make_sound()

    def hold(self) -> None:
        """The default device and stream are what they were. Under a microsecond."""
        mx.set_default_device(self._device)
        mx.set_default_stream(self._stream)


def _fetch_pending_errors(*streams: mx.Stream) -> None:
    """Has MLX raise what it has stored of the default stream and of ``streams``.

    Raises:
        GPUError: fatal: nothing can be computed any more.
    """
    for stream in (None, *streams):
        _fetch_from(stream)


def _fetch_from(stream: mx.Stream | None) -> None:
    for _ in range(PENDING_ERRORS_MAX):
        try:
            mx.synchronize(*(() if stream is None else (stream,)))
            return
        except RuntimeError as e:
            fault = errors.from_exception(e)
            if fault is not None and fault.fatal:
                raise fault from None  # it stays, however often one waits
            log.info("an error was still pending: %s", str(e).splitlines()[:1])
    log.warning("MLX still reports errors after %d waits", PENDING_ERRORS_MAX)
