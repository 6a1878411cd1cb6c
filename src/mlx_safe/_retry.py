"""`retry`: the same work again after a fault that may pass; and `next_fault`."""

from __future__ import annotations

import sys

from . import _faults, errors
from ._exceptions import clear_frames
from ._guard import guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ._fault import Fault

    T = TypeVar("T")

__all__ = ["next_fault", "retry"]


def may_pass(exc: Exception) -> bool:
    """Whether the same work may succeed when it is done again. Any thread."""
    fault = errors.from_exception(exc)
    return errors.is_allocation_failure(exc) if fault is None else fault.retryable


def retry(
    function: Callable[[], T],
    attempts: int = 3,
    *,
    on: Callable[[Exception], bool] = may_pass,
    before: Callable[[Exception, int], object] | None = None,
) -> T:
    """Returns ``function()``, called again after a fault of the GPU that may pass.

    ``function`` must evaluate what it computes (``mx.eval``), and make everything anew
    in each call. What a failed call has computed is garbage, a KV cache that it has
    written to included. Between two calls what the failed one held is freed, MLX's
    stored errors are fetched, and MLX's pool goes back to the device.

    Called by the thread that evaluates; it blocks.

    Args:
        function: takes nothing; a `guard` is around each call.
        attempts: how often it is called at most; 1 or more.
        on: whether to try again after this exception. By default: a `GPUError` that
            is ``retryable``, or a failed allocation. Asked about those two alone:
            another exception is raised at once.
        before: called as ``before(exc, n)`` before the call after the ``n``-th, to
            make that one smaller, say.

    Raises:
        GPUError: the last attempt failed so, or ``on`` said no.
        TypeError, ValueError: an argument is not as above; ``function`` returns a
            coroutine or a generator, whose work would be done outside.
        Exception: whatever else ``function`` raises, at once.
    """
    _check(function, attempts, on, before)
    for n in range(1, attempts + 1):
        try:
            with guard():
                result = function()
                if _is_lazy(result):
                    raise _not_yet(result)
                return result
        except Exception as e:
            fault = errors.from_exception(e)
            passes = fault is not None or errors.is_allocation_failure(e)
            if n == attempts or not passes or not on(e):
                raise
            failed = e
        _reset(failed)
        if before is not None:
            before(failed, n)
    raise AssertionError("the last attempt returns or raises")


def _check(function: object, attempts: object, on: object, before: object) -> None:
    if not callable(function):
        raise TypeError(
            "retry() needs a function that takes nothing, not "
            f"{type(function).__name__}"
        )
    if not isinstance(attempts, int) or isinstance(attempts, bool):
        raise TypeError(
            f"attempts must be a whole number of calls, not {type(attempts).__name__}"
        )
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts}")
    # A class can be called, too: with the exception it would make another one.
    if isinstance(on, type) or not callable(on):
        raise TypeError(
            "on must be a function that says whether to try again after an exception, "
            f"such as lambda exc: isinstance(exc, MemoryError), not {on!r}"
        )
    if not (before is None or callable(before)):
        raise TypeError(f"before must be a function or None, not {before!r}")


def _is_lazy(result: object) -> bool:
    """Whether nothing has been done yet: a coroutine, or a generator."""
    import types

    kinds = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)
    return isinstance(result, kinds)


def _not_yet(result: Any) -> TypeError:
    what = type(result).__name__
    if hasattr(result, "close"):
        result.close()
    return TypeError(
        f"retry(): the function returned a {what}, and nothing of it has run. "
        "Return what is computed: retry(lambda: list(generate())), or "
        "retry(lambda: asyncio.run(step())). In a running loop: "
        "await asyncio.to_thread(retry, function)"
    )


def _reset(exc: Exception) -> None:
    """Frees what the failed call held. `guard` has waited and fetched MLX's errors."""
    clear_frames(exc)
    mx = sys.modules.get("mlx.core")
    if mx is not None:
        mx.clear_cache()


async def next_fault(since: int | None = None) -> Fault:
    """Waits for the next fault of the GPU. For an asyncio task of any loop.

    Args:
        since: the epoch after which a fault counts; None: now. Give the ``number`` of
            the last one to miss none in between.

    Raises:
        OSError: no file descriptor is left for the notification.
        TypeError: ``since`` is no number.
    """
    import asyncio
    import contextlib

    if since is not None and not isinstance(since, int):
        raise TypeError(f"since must be an epoch or None, not {type(since).__name__}")
    loop = asyncio.get_running_loop()
    after = _faults.epoch() if since is None else since
    come = asyncio.Event()

    def note(fault: Fault) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(come.set)

    with _faults.on_fault(note):
        while not (found := _faults.faults(after)):
            await come.wait()
            come.clear()
        return found[0]
