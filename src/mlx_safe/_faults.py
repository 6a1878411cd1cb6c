"""The fault log as Python sees it: epoch, faults, check, callbacks.

Everything here may be called from any thread. Reading the epoch takes no lock
and well under a microsecond.
"""

from __future__ import annotations

import threading
import time

from . import _core, _tasks, errors
from ._fault import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Fault",
    "Subscription",
    "check",
    "deal_with",
    "drained",
    "draining",
    "epoch",
    "faults",
    "leave_soon",
    "log_terminate",
    "on_fault",
    "unreported",
    "watch",
]

_SOURCES = ("metal", "terminate", "injected")
# A writer has claimed its place but not filled it: a few microseconds, unless
# the machine is very busy. Counted, and not by a clock, which goes on while this
# process is stopped.
_WRITER_WAITS = 500
_WRITER_WAIT_S = 0.0005
# EX_TEMPFAIL: the parent should start the process again. The same number as
# `kDrainedExitStatus` in src/cpp/crash/terminate.h.
EXIT_REPLACE = 75
# How often the thread of the callbacks looks around without a fault.
LOOK_EVERY_S = 5.0


def _make(record: dict[str, object]) -> Fault:
    code = int(record["code"])  # type: ignore[call-overload]
    kind = errors.kind_of(code)
    source = _SOURCES[int(record["source"])]  # type: ignore[call-overload]
    seconds = record["time_ns"] / 1e9  # type: ignore[operator]
    return Fault(
        number=record["number"],
        code=code,
        name=kind.name,
        message=record["message"],
        retryable=kind.retryable and source != "terminate",
        # What reached terminate has left a thread of MLX or Metal dead.
        fatal=kind.fatal or source == "terminate",
        source=source,
        time=seconds,
        thread=record["thread"],
        buffer=record["buffer"],
        queue=record["queue"],
        label=record["label"],
        gpu_start=record["gpu_start_s"],
        gpu_end=record["gpu_end_s"],
        tasks=_tasks.names_of(int(record["buffer"]), seconds),  # type: ignore[call-overload]
    )


def _lost(number: int) -> Fault:
    """Stands for a fault whose record was overwritten or never finished."""
    return Fault(
        number=number,
        code=-1,
        name=errors.kind_of(-1).name,
        message="",
        retryable=True,
        fatal=False,
        source="metal",
        time=0.0,
        thread=0,
        buffer=0,
        queue=0,
        label="",
        gpu_start=0.0,
        gpu_end=0.0,
        tasks=(),
    )


def epoch() -> int:
    """How many faults this process has had. Grows by one with each."""
    return _core.epoch()


def faults(since: int = 0) -> list[Fault]:
    """The faults after epoch ``since``, newest last.

    The log holds the last 256; older ones are left out (`epoch` still counts
    them).
    """
    now = _core.epoch()
    found = []
    waits = _WRITER_WAITS
    for number in range(max(since + 1, now - 255, 1), now + 1):
        record = _core.read_fault(number)
        while record is False and waits > 0:
            waits -= 1
            time.sleep(_WRITER_WAIT_S)
            record = _core.read_fault(number)
        if isinstance(record, dict):
            found.append(_make(record))
    return found


def check(since: int) -> None:
    """Raises the `MetalError` for the faults after epoch ``since``, if any."""
    now = _core.epoch()
    if now <= since:
        return
    deal_with()
    raise errors.from_faults(faults(since) or [_lost(now)])


# All up to this one were raised as a typed error, or a client was answered for them.
_dealt_with = 0


def deal_with() -> None:
    """The faults so far are in hands that know what to do about them. Any thread."""
    global _dealt_with
    _dealt_with = _core.epoch()


def unreported(since: int) -> bool:
    """Whether there is a fault after ``since`` that nobody has dealt with."""
    return _core.epoch() > max(since, _dealt_with)


class Subscription:
    """What `on_fault` returns: call `cancel` to get no more faults.

    Also a context manager that cancels on exit. `cancel` may be called from
    any thread, the callback included, and more than once. A call that is
    already under way is not waited for.
    """

    def __init__(
        self,
        callback: Callable[[Fault], object],
        meanwhile: Callable[[], object] | None = None,
        drains: bool = False,
    ) -> None:
        self._callback = callback
        self._drains = drains
        self._meanwhile = meanwhile
        self._cancelled = False
        # Earlier faults, for which others are still being called, are not for it.
        self._since = _core.epoch()

    def cancel(self) -> None:
        self._cancelled = True
        _dispatcher.remove(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()


# For a callback that hangs; a report takes milliseconds. In turns: while the process
# is stopped, no callback goes on either.
END_WAIT_S = 5.0
END_TURNS = 50


class _Dispatcher:
    """The thread that calls the callbacks; started by the first of them.

    It sleeps in ``poll`` on the log's descriptor, so Metal's threads never
    touch Python.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._thread: threading.Thread | None = None
        self._told = 0
        # Held while callbacks run.
        self._calling = threading.Lock()
        self._ended = False

    def add(self, subscription: Subscription) -> None:
        import select  # noqa: F401

        if subscription._drains:
            # When they are needed no descriptor may be left to import them with.
            import logging  # noqa: F401
        with self._lock:
            if not self._subscriptions:
                self._told = _core.epoch()
            self._subscriptions.append(subscription)
            if self._thread is None:
                fd = _core.notify_fd()
                if fd < 0:
                    self._subscriptions.remove(subscription)
                    raise OSError("no file descriptor is left for fault callbacks")
                self._thread = threading.Thread(
                    target=self._run, args=(fd,), name="mlx-safe-faults", daemon=True
                )
                self._thread.start()
                import atexit

                atexit.register(self._end)
            _core.terminate_drainers(int(subscription._drains))

    def remove(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
                _core.terminate_drainers(-int(subscription._drains))

    def forget_parent(self) -> None:
        """In a forked child: its threads and its parent's pipe are gone."""
        self.__init__()  # type: ignore[misc]

    def _run(self, fd: int) -> None:
        import select

        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while True:
            poller.poll(LOOK_EVERY_S * 1000)
            with self._calling:
                if self._ended:
                    return
                self._tell()
                self._look()

    def _tell(self) -> None:
        _core.drain_notifications()
        new = faults(self._told)
        if new:
            self._told = new[-1].number
        for fault in new:
            with self._lock:
                current = list(self._subscriptions)
            drains = fault.source == "terminate" and any(s._drains for s in current)
            if drains:
                log_terminate()
            for subscription in current:
                self._call(subscription, fault)
            if drains:
                drained()

    def _look(self) -> None:
        with self._lock:
            current = list(self._subscriptions)
        for subscription in current:
            if subscription._meanwhile is not None:
                subscription._meanwhile()

    def _end(self) -> None:
        """At the interpreter's end: waits for the callbacks that run.

        Python up to 3.13 unwinds a daemon thread that asks for the GIL after the
        end. In a native function that released it (the report's writer, most of
        MLX) the unwinding meets nanobind's ``noexcept``, and the process aborts.
        """
        self._ended = True
        for _ in range(END_TURNS):
            if self._calling.acquire(timeout=END_WAIT_S / END_TURNS):
                self._calling.release()
                return

    def _call(self, subscription: Subscription, fault: Fault) -> None:
        if subscription._cancelled or fault.number <= subscription._since:
            return
        try:
            subscription._callback(fault)
        except Exception:
            # One bad callback must not keep the others from being called.
            import logging

            logging.getLogger("mlx_safe").exception(
                "a fault callback failed on %r", fault
            )


_dispatcher = _Dispatcher()


_logging = threading.Lock()
# The faults up to this one are in the log if they reached std::terminate.
_logged = 0


def log_terminate() -> None:
    """Logs what has reached std::terminate, each once; its report is written then.

    Any thread: the one that computes may see it, and leave, before the callbacks do.
    Nobody is answered before: the report would name nobody who was in flight.
    """
    import logging

    global _logged
    with _logging:
        for fault in faults(_logged):
            _logged = fault.number
            if fault.source == "terminate":
                logging.getLogger("mlx_safe").error(
                    "an exception reached std::terminate: %s; answering the clients, "
                    "then leaving with status 75",
                    fault.message,
                )
                _core.terminate_reported()


_leaving = threading.Event()


def draining() -> bool:
    """Whether the process is about to leave with status 75.

    An exception has reached std::terminate under ``"drain"``, or `mlx_safe.asgi`
    answers the clients after a fault that is fatal. It leaves as soon as they have
    their answers: take no new work. Any thread.
    """
    return _leaving.is_set() or _core.terminate_reached()


def leave_soon() -> None:
    """`draining` from now on; the caller ends the process. Any thread."""
    _leaving.set()


def drained() -> None:
    """The clients have their answers: a process that is `draining` leaves at once.

    Called for you when the callbacks of ``on_fault(…, drains=True)`` have returned.
    Does nothing in a process that is not `draining`, nor in one whose clients
    `mlx_safe.asgi` answers after a fatal fault: that leaves by itself. Any thread.
    """
    if _core.terminate_reached():
        _core.terminate_drained()


def on_fault(
    callback: Callable[[Fault], object], *, drains: bool = False
) -> Subscription:
    """Calls ``callback(fault)`` for each fault from now on.

    It is called on a thread of mlx-safe, never on Metal's; one call at a time, in the
    order of the faults. An exception in it is logged and does not reach anybody.
    Returns a `Subscription` whose ``cancel()`` ends it.

    Args:
        drains: with ``install(on_terminate="drain")``: a fault whose ``source`` is
            ``"terminate"`` ends the process, and this callback answers the clients
            first. The process leaves with status 75 when it has returned, after
            ``drain_seconds`` at the latest. Without such a callback it leaves at
            once, since nobody would be answered by waiting.

    Raises:
        TypeError: ``callback`` cannot be called.
        OSError: no file descriptor is left for the notification.
    """
    if not callable(callback):
        raise TypeError(f"on_fault needs a callable, not {type(callback).__name__}")
    return watch(callback, drains=drains)


def watch(
    callback: Callable[[Fault], object],
    meanwhile: Callable[[], object] | None = None,
    *,
    drains: bool = False,
) -> Subscription:
    """As `on_fault`; ``meanwhile``, of our own, is called on that thread as well.

    That is after faults, and every `LOOK_EVERY_S` seconds; it must not raise.
    """
    subscription = Subscription(callback, meanwhile, drains)
    _dispatcher.add(subscription)
    return subscription


def after_fork_in_child() -> None:
    _core.after_fork_in_child()
    deal_with()
    global _logging, _logged
    _logging, _logged = threading.Lock(), _core.epoch()
    _leaving.clear()
    _tasks.forget()
    _dispatcher.forget_parent()
