"""Whether the GPU is as lost as a text says, and the end of the process."""

from __future__ import annotations

import os
import sys
import threading

from .. import _core, _faults, _output, errors

__all__ = ["gpu_is_lost", "leave"]

# One that hangs is the last.
_asking = threading.Lock()


def gpu_is_lost() -> bool:
    """Whether the GPU fails this process for good. Blocks; a thread of its own.

    Asked where a fatal fault is known by its text alone, as CUDA's are. A client may
    have sent that text, so the GPU is given something to do. After an error of CUDA
    that stays, and after Metal's code 4, each call fails with it.
    """
    plans = sys.modules.get("mlx_safe.testing.plans")
    if plans is not None and plans.loses_gpu():
        return True
    mx = sys.modules.get("mlx.core")
    if mx is None:  # it tells of another process
        return False
    if not _asking.acquire(blocking=False):
        return False
    try:
        (mx.array([1.0]) + 1.0).item()
    except Exception as e:
        fault = errors.from_exception(e)
        return fault is not None and fault.fatal
    finally:
        _asking.release()
    return False


def leave() -> None:
    """Ends the process with status 75, for another to be started. Any thread."""
    # Not by sys.exit: the interpreter would wait for MLX, whose threads may be lost.
    _output.flush()
    _core.remove_run_file()
    os._exit(_faults.EXIT_REPLACE)
