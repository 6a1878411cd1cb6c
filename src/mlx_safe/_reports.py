"""Breadcrumbs, and reports of a process that lives on.

The writer itself is native (`src/cpp/crash/report.cpp`) and the same one that writes
when the process dies. Everything here may be called from any thread.
"""

from __future__ import annotations

# The module `signal` makes enums of them, which takes a millisecond.
import _signal  # type: ignore[import-not-found]
import os
import sys
import threading
import time

from . import _core, _faults
from ._fault import Fault
from ._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "breadcrumb",
    "finish",
    "keep_fresh",
    "name_process",
    "refresh_run_file",
    "remove_run_file",
    "sample_memory",
    "set_memory_limits",
    "set_server",
    "stacks",
    "start",
    "stop",
    "suppressed",
    "watch_faults",
    "write",
    "write_fault",
    "write_fault_beside",
]

# A fault that lasts must not fill the disk: the report of the first tells most.
FAULT_REPORT_EVERY_S = 10.0
FAULT_REPORTS_MAX = 20

# A tenth of a second old at most, however many steps a second there are.
SAMPLE_EVERY_S = 0.1
RUN_FILE_EVERY_S = 5.0

# For a disk that hangs. In turns: see `_faults.END_TURNS`.
FINISH_WAIT_S = 2.0
FINISH_TURNS = 20


def breadcrumb(text: str, /, **fields: str | int | float | bool | None) -> None:
    """Leaves a note for crash reports: what this process was doing.

    The last 256 are kept, in native memory, and are part of every report; they
    cost well under a microsecond (figures: docs/library.md). Any thread.

    Args:
        text: what happens; cut at 95 bytes.
        fields: figures that belong to it, 127 bytes of JSON in all; one that
            does not fit is left out. Of any other type than these, only the
            type's name is kept.

    Do not put in what must not be in a report: text of prompts, keys.
    """
    _core.breadcrumb("note", text, fields)


class _State:
    """Of this process; a forked child begins with a new one."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.lock = threading.Lock()  # held while a report is written
        self.count_lock = threading.Lock()
        self.fault_reports = 0
        self.suppressed = 0
        self.last_fault_report = float("-inf")
        self.logged_failure = False
        self.subscription: _faults.Subscription | None = None
        self.writing: threading.Thread | None = None
        self.sampled_at = float("-inf")
        self.run_file_lock = threading.Lock()
        self.run_file_at = float("-inf")
        self.peak = -1
        self.ceiling = -1
        self.context: dict[str, object] = {}
        self.context_lock = threading.Lock()
        self.facts: dict[str, object] = {}


_state = _State()
_removed_by = -1  # the process whose end removes its run file


def start(directory: str | None, context: Mapping[str, object]) -> str | None:
    """Prepares the writer; called by `install`, under its lock.

    Returns why there will be no reports, or None.

    Args:
        directory: where reports go; None: nowhere.
        context: JSON-able facts about this process that each report tells.
    """
    _state.directory = directory
    _core.report_prepare(
        None if directory is None else os.fsencode(directory),
        _program().encode(errors="replace"),
    )
    with _state.context_lock:
        _state.context = {**_machine(), **context}
        fits = _core.set_report_context({**_state.context, **_state.facts})
    if not fits:
        return "crash reports leave out versions and hooks, which take over 16 KB"
    if directory is None:
        return None
    _remove_run_file_at_the_end()
    _stop_in_order()
    _sample()  # whatever comes next is not too soon after it
    with _state.run_file_lock:
        written = _core.write_run_file()
    if not written:
        return f"cannot write the run file in {directory}"
    return None


def _program() -> str:
    """As one starts it: the script's name, or that of the module behind ``-m``."""
    name = os.path.basename(sys.argv[0] if sys.argv else "")
    # The first while Python looks for the module, the second of a package.
    if name not in ("-m", "__main__.py"):
        return name
    # Before the program's own arguments, which may have a -m as well.
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if before[-2:-1] != ["-m"]:
        return name
    # The supervisor starts the command of this name so.
    return "mlx-safe" if before[-1] == __package__ else before[-1]


def _remove_run_file_at_the_end() -> None:
    global _removed_by
    if _removed_by == os.getpid():
        return
    _removed_by = os.getpid()
    import atexit

    atexit.register(remove_run_file)
    # multiprocessing ends its forked workers with os._exit, without atexit.
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, remove_run_file, exitpriority=0)


def name_process(**facts: object) -> None:
    """Has reports tell ``facts`` of this process from now on: what it serves, say."""
    with _state.context_lock:
        _state.facts.update(facts)
        _core.set_report_context({**_state.context, **_state.facts})
    if _state.directory is not None:
        with _state.run_file_lock:
            _core.write_run_file()


# That end a process, where nobody handles them: init systems, containers, terminals.
_STOPS = (_signal.SIGTERM, _signal.SIGHUP)


def _stop_in_order() -> None:
    """Has a process that is stopped by a signal remove its run file.

    The native handler does it at once, whatever Python is at. Python's own handler is
    for programs that take the signal over and put back what was there, as uvicorn
    does, which then raises it again: they know of Python's handlers only.
    """
    for number in _STOPS:
        is_ours = _signal.getsignal(number) is _stopped
        if is_ours or _core.signal_is_default(number):
            stop_by(number)


def stop_by(number: int) -> None:
    """Has this signal end the process by its default, without its run file."""
    _handle(number, _stopped)  # or only the native one does it
    _core.stop_install(number)


def _handle(number: int, handler: Any) -> None:
    try:
        _signal.signal(number, handler)
    except ValueError:  # Python lets the main thread do it, and no other
        return


def _stopped(number: int, frame: object) -> None:
    remove_run_file()
    _signal.signal(number, _signal.SIG_DFL)
    _signal.raise_signal(number)


def _stop_as_ever() -> None:
    for number in _STOPS:
        if _signal.getsignal(number) is _stopped:
            _handle(number, _signal.SIG_DFL)
        _core.stop_uninstall(number)


def stop() -> None:
    """Ends all of it; called by `uninstall`."""
    _stop_as_ever()
    with _state.run_file_lock:
        _core.remove_run_file()
        _core.report_stop()
        _state.directory = None
    if _state.subscription is not None:
        _state.subscription.cancel()
    _state.subscription = None


def after_fork_in_child() -> None:
    """The run file and the counts are the parent's."""
    directory = _state.directory
    _state.__init__()  # type: ignore[misc]
    _state.directory = directory


def suppressed() -> int:
    """Faults that got no report of their own, as there was one just before."""
    return _state.suppressed


def watch_faults() -> None:
    """From now on each fault gets a report, on the thread of the callbacks.

    `install` calls this where Metal is hooked; elsewhere there are no faults
    but those of `mlx_safe.testing`, and no process needs the thread.
    """
    with _state.lock:
        if _state.subscription is None and _state.directory is not None:
            _state.subscription = _faults.watch(_report_fault, _look)


def _report_fault(fault: Fault) -> None:
    if fault.source != "terminate":  # the terminate handler has written one
        write_fault(fault.message, fault.code)


def write_fault(message: str, code: int) -> None:
    """A report of a fault, unless there was one just before; arguments of `write`."""
    if _is_to_be_written():
        write("fault", message, code)


def write_fault_beside(message: str, code: int) -> None:
    """`write_fault` on a thread of its own, for callers that must not wait.

    A report of the process's death before that has it as well: it leaves a breadcrumb
    first. An end in good order waits for it (`finish`).
    """
    _core.breadcrumb("fault", message[:95], {"code": code})
    if _state.directory is None or not _is_to_be_written():
        return
    # No daemon: the interpreter's end waits for it.
    thread = threading.Thread(
        target=write, args=("fault", message, code), name="mlx-safe-report"
    )
    _state.writing = thread
    try:
        thread.start()
    except RuntimeError:  # no thread can be started any more
        _state.writing = None
        write("fault", message, code)


def finish() -> None:
    """Waits for a report that is being written; for an end by ``os._exit``."""
    thread = _state.writing
    for _ in range(FINISH_TURNS if thread is not None else 0):
        assert thread is not None
        thread.join(FINISH_WAIT_S / FINISH_TURNS)
        if not thread.is_alive():
            return


def _is_to_be_written() -> bool:
    """Whether a fault gets a report of its own now; counts it."""
    now = time.monotonic()
    with _state.count_lock:
        if (
            now - _state.last_fault_report < FAULT_REPORT_EVERY_S
            or _state.fault_reports >= FAULT_REPORTS_MAX
        ):
            _state.suppressed += 1
            return False
        _state.last_fault_report = now
        _state.fault_reports += 1
        return True


def write(why: str, message: str, code: int | None = None) -> str | None:
    """Writes a report with the Python stacks of all threads; not rate-limited.

    Args:
        why: "fault" or "stall".
        message: one line that says what happened.
        code: IOGPU code; None where it is about none.

    Returns its path; None when there is none, which is counted and logged.
    Takes a few milliseconds.
    """
    directory = _state.directory
    if directory is None:
        return None
    sample_memory(at_least_s=0.0)
    with _state.lock:
        path = _core.write_report(why, message, code, _python_stacks(directory))
    if path is None:
        _log_failure(directory)
        return None
    return os.fsdecode(path)


def _log_failure(directory: str) -> None:
    import logging

    # Once is enough; `status().reports_failed` counts on.
    level = logging.DEBUG if _state.logged_failure else logging.ERROR
    _state.logged_failure = True
    logging.getLogger("mlx_safe").log(
        level, "a crash report could not be written to %s", directory
    )


def stacks() -> str:
    """The Python stacks of all threads, with their names; takes milliseconds."""
    import tempfile

    return _python_stacks(_state.directory or tempfile.gettempdir())


def _python_stacks(directory: str) -> str:
    import faulthandler

    path = os.path.join(directory, f".stacks-{os.getpid()}-python")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
    except OSError as e:
        return f"not available: {e.strerror}"
    try:
        os.unlink(path)
        faulthandler.dump_traceback(fd, all_threads=True)
        return _with_names(os.pread(fd, 1 << 20, 0).decode(errors="replace"))
    except OSError as e:
        return f"not available: {e.strerror}"
    finally:
        os.close(fd)


def _with_names(stacks: str) -> str:
    """faulthandler's text with what it does not tell: who the threads are.

    The current thread is the one that reports, which is of least interest.
    """
    known = {
        f"0x{thread.ident or 0:016x}": f"{thread.native_id} {thread.name!r}"
        for thread in threading.enumerate()
    }
    others, own = [], []
    for block in stacks.rstrip("\n").split("\n\n"):
        header, newline, frames = block.partition("\n")
        whose, _, rest = header.partition(" 0x")
        ident, _, rest = f"0x{rest}".partition(" ")
        name = f"{known[ident]}, {ident}" if ident in known else ident
        if whose == "Current thread":
            own.append(f"The thread that reports, {name} {rest}{newline}{frames}")
        elif whose == "Thread":
            others.append(f"Thread {name} {rest}{newline}{frames}")
        else:
            others.append(block)
    return "\n\n".join(others + own) + "\n"


def set_server(figures: Mapping[str, object]) -> None:
    """Each report tells of the server, too, from now on: JSON-able figures, no text.

    Any thread; not more often than once a second, as a crash may be reading it.
    """
    with _state.context_lock:
        named = _state.facts.get("server")
        server = {**(named if isinstance(named, dict) else {}), **figures}
        facts = {**_state.facts, "server": server}
        if facts != _state.facts and _core.set_report_context(
            {**_state.context, **facts}
        ):
            _state.facts = facts


def set_memory_limits(*, peak: int = -1, ceiling: int = -1) -> None:
    """Figures for the samples from now on that neither MLX nor the system has.

    Args, in bytes; -1: unknown:
        peak: the most that was active, for a process that resets MLX's.
        ceiling: of what may be active.
    """
    _state.peak = peak
    _state.ceiling = ceiling


def keep_fresh() -> None:
    """Keeps what a report has of this process if it is killed: cheap, for every step.

    A sample of memory, at most one in `SAMPLE_EVERY_S`; and the run file, where
    the thread of the callbacks does not see to it.
    """
    if sample_memory() and _state.subscription is None:
        refresh_run_file()


def _look() -> None:
    """What that thread does every few seconds."""
    sample_memory()
    refresh_run_file()


def sample_memory(at_least_s: float = SAMPLE_EVERY_S) -> bool:
    """Keeps the memory figures of MLX and the system for reports.

    Cheap enough for every step: it does nothing, and returns False, when the last
    sample is younger than ``at_least_s`` seconds. One takes some 30 µs.
    """
    now = time.monotonic()
    if now - _state.sampled_at < at_least_s:
        return False
    _state.sampled_at = now
    _sample()
    return True


def _sample() -> None:
    mx = sys.modules.get("mlx.core")
    if mx is not None and hasattr(mx, "get_active_memory"):  # may be on its way
        active = mx.get_active_memory()
        peak = max(_state.peak, mx.get_peak_memory())
        _core.sample_memory(active, peak, mx.get_cache_memory(), _state.ceiling)
    else:
        _core.sample_memory(-1, -1, -1, _state.ceiling)


def refresh_run_file() -> None:
    """Rewrites the run file when it is over `RUN_FILE_EVERY_S` seconds old.

    Any thread; not after the end has removed it, nor in a forked child, which has
    none.
    """
    now = time.monotonic()
    if now - _state.run_file_at < RUN_FILE_EVERY_S:
        return
    # Its owner writes just now. A guard must not wait for a disk.
    if not _state.run_file_lock.acquire(blocking=False):
        return
    try:
        directory = _state.directory
        if (
            directory is None
            or _removed_by != os.getpid()
            or now - _state.run_file_at < RUN_FILE_EVERY_S
        ):
            return
        _state.run_file_at = now
        written = _core.write_run_file()
    finally:
        _state.run_file_lock.release()
    if not written:
        _log_failure(directory)


def remove_run_file() -> None:
    """The process ends well: its run file goes, and is not written anew."""
    # A disk that hangs must not keep the process from ending.
    locked = _state.run_file_lock.acquire(timeout=2.0)
    _state.run_file_at = float("inf")
    _core.remove_run_file()
    if locked:
        _state.run_file_lock.release()


def _machine() -> dict[str, object]:
    system = os.uname()
    return {
        "mlx_safe": __version__,
        "python": sys.version.split()[0],
        "os": _macos_version() or f"{system.sysname} {system.release}",
        "machine": system.machine,
    }


def _macos_version() -> str | None:
    """Without the module platform, whose import takes milliseconds."""
    if sys.platform != "darwin":
        return None
    try:
        with open("/System/Library/CoreServices/SystemVersion.plist") as file:
            _, found, rest = file.read().partition("<key>ProductVersion</key>")
    except OSError:
        return None
    version = rest.partition("<string>")[2].partition("</string>")[0]
    return f"macOS {version}" if found and version else None
