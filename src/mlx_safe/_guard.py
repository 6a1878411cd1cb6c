"""`guard` and `check`: no fault in a block goes unnoticed."""

from __future__ import annotations

import sys

from . import _core, _faults, _install, _reports, _tasks, errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["check", "guard"]

# Streams that one thread can have a stored error of; no more is waited for.
_PENDING_MAX = 8


def check(since: int) -> None:
    """Raises the `MetalError` for the faults after epoch ``since``, if any.

    The error's class is that of the worst fault; all of them are in its
    ``faults``.
    """
    _reports.keep_fresh()
    _faults.check(since)


class guard:
    """Raises a `MetalError` on leaving the block if there was a fault in it.

    As a context manager, and as a decorator:

        with mlx_safe.guard():
            mx.eval(y)

        async with mlx_safe.guard():
            ...

        @mlx_safe.guard()          # functions, coroutine functions, generators
        def step(): ...

    A fault counts whether MLX raised an error for it, raised it elsewhere or
    swallowed it. An error of MLX that names a fault is turned into the typed
    one, with MLX's as its cause. Any other exception passes as it is; a fault
    in the same block is then added to it as a note (Python 3.11 and later).

    What it covers is the work that was *waited for* inside the block
    (``mx.eval``, ``mx.synchronize``, ``.item()``), since MLX is lazy. It counts
    the faults of the whole process: a fault may come from work that another
    thread or task submitted.

    With a name it is a task: ``tasks`` of what is raised has the names of the guards
    that its faults may belong to. So has each `Fault`, for callbacks of `on_fault`. A
    command buffer belongs to the guards that were open when it was committed. Guards
    that were open side by side, in threads or asyncio tasks, are all named.

        async with mlx_safe.guard(name=f"request {number}"):
            ...

    Args:
        name: of the task, for people; None: it has none. It costs some microseconds.

    Raises:
        TypeError: ``name`` is no text.

    A guard object is entered once at a time; blocks that run side by side each
    take their own.
    """

    def __init__(self, *, name: str | None = None) -> None:
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"name must be a text, not {type(name).__name__}")
        self._name = name
        self._task: _tasks.Task | None = None
        self._since: int | None = None

    def __enter__(self) -> guard:
        if self._since is not None:
            raise RuntimeError("this guard is entered already: use mlx_safe.guard()")
        if self._name is not None:
            self._task = _tasks.Task(self._name)
        self._since = _core.epoch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        since, self._since = self._since, None
        if since is not None:
            _reports.keep_fresh()
            try:
                _settle(since, exc)
            finally:
                task, self._task = self._task, None
                if task is not None:
                    task.end()

    async def __aenter__(self) -> guard:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, exc, trace)

    def __call__(self, function: F) -> F:
        import functools
        import inspect

        def block() -> guard:
            return guard(name=self._name)

        wrapped: Any
        if inspect.iscoroutinefunction(function):

            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                with block():
                    return await function(*args, **kwargs)

        elif inspect.isasyncgenfunction(function):

            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                # What "yield from" does for a generator that is not asynchronous.
                with block():
                    inner = function(*args, **kwargs)
                    try:
                        item = await inner.asend(None)
                        while True:
                            try:
                                sent = yield item
                            except GeneratorExit:
                                raise
                            except BaseException as e:
                                item = await inner.athrow(e)
                            else:
                                item = await inner.asend(sent)
                    except StopAsyncIteration:
                        return
                    finally:
                        # Not when it is collected: its end is of the block, too.
                        await inner.aclose()

        elif inspect.isgeneratorfunction(function):

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with block():
                    return (yield from function(*args, **kwargs))

        else:

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with block():
                    return function(*args, **kwargs)

        functools.update_wrapper(wrapped, function)
        result: F = wrapped
        return result


def _settle(since: int, exc: BaseException | None) -> None:
    """Raises what the block that began at epoch ``since`` has earned."""
    # A generator that is left early has ended well, and nobody reads a note on that.
    if exc is not None and not isinstance(exc, GeneratorExit):
        typed = errors.from_exception(exc)
        if typed is not None:
            _faults.deal_with()
            # MLX 0.32 raises a stored error without a wait, and the memory of
            # what has failed may still be written to.
            _core.metal_wait_for_skipped()
            logged = _faults.faults(since)
            if logged and not typed.fatal:
                # MLX may name a milder fault than the worst there was.
                worst = errors.from_faults(logged)
                typed = worst if worst.fatal else typed
            _drain(typed)
            if not typed.tasks:
                typed._around = _tasks.in_this_context()
            if typed is not exc:
                typed.faults = tuple(logged)
                raise typed from exc
            return
        if _core.epoch() > since and hasattr(exc, "add_note"):
            exc.add_note("mlx_safe: the GPU failed a command buffer meanwhile")
        return
    try:
        _faults.check(since)
    except errors.GPUError as e:
        _drain(e)
        raise


def _note(exc: BaseException, text: str) -> None:
    """Adds ``text`` to what is shown of ``exc``; a warning before Python 3.11."""
    if hasattr(exc, "add_note"):
        exc.add_note(text)
    else:
        import warnings

        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _drain(known: errors.GPUError) -> None:
    """Fetches MLX's own errors of the failures that the guard is about to raise.

    MLX stores one for each stream (0.32) and raises it from a later wait. The next
    evaluation, which may have nothing to do with it, would fail for what is known. Only
    a wait makes it raise what it has stored: this one is for the work of the calling
    thread's default stream, whatever that is. MLX up to 0.31.2 stores none.
    """
    mx = sys.modules.get("mlx.core")
    if mx is None or known.fatal or _install.regime() != "observe":
        return
    for _ in range(_PENDING_MAX):
        try:
            mx.synchronize()
            return
        except RuntimeError as e:
            if errors.from_exception(e) is None:
                _note(known, f"mlx_safe: MLX also reports another error: {e}")
