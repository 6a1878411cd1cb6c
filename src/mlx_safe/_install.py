"""install, uninstall, status: what is active in this process, and why not.

Serialised by one lock, idempotent, callable from any thread.
"""

from __future__ import annotations

import os
import sys
import threading

from . import _core, _faults, _mlx_versions, _paths, _reports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

__all__ = ["Status", "install", "require", "status", "uninstall"]

_lock = threading.RLock()


class Status:
    """What `status` returns: a snapshot, immutable by convention.

    Attributes:
        installed: `install` was called and not undone.
        mode: ``"intercept"``, ``"observe"`` or None when not installed.
        on_terminate: ``"report"``, ``"drain"`` or None when not installed.
        terminate_handler: the terminate handler is in place.
        metal_hooks: Metal's command buffers are hooked.
        signals: SIGSEGV and its like leave a report.
        verified: a trivial command buffer was run and the hooks saw it.
        hooked: names of the hooked methods, ``-[Class selector]``.
        runtime: path of the Objective-C runtime, or None.
        mlx_version: version of the installed mlx, or None.
        mlx_notes: what is known of how this version treats a fault, one line each.
        report_dir: directory of the crash reports, or None.
        reports_written: crash reports of this process.
        reports_failed: those that could not be written, or not whole.
        reports_suppressed: faults that got none, as there was one just before.
        epoch: faults so far.
        dropped: faults whose record was lost.
        reasons: one line for each thing that is not active.
    """

    __slots__ = (
        "dropped",
        "epoch",
        "hooked",
        "installed",
        "metal_hooks",
        "mlx_notes",
        "mlx_version",
        "mode",
        "on_terminate",
        "reasons",
        "report_dir",
        "reports_failed",
        "reports_suppressed",
        "reports_written",
        "runtime",
        "signals",
        "terminate_handler",
        "verified",
    )

    installed: bool
    mode: str | None
    on_terminate: str | None
    terminate_handler: bool
    metal_hooks: bool
    verified: bool
    hooked: tuple[str, ...]
    runtime: str | None
    mlx_version: str | None
    mlx_notes: tuple[str, ...]
    report_dir: str | None
    signals: bool
    reports_written: int
    reports_failed: int
    reports_suppressed: int
    epoch: int
    dropped: int
    reasons: tuple[str, ...]

    def __init__(self, **fields: object) -> None:
        for name in Status.__slots__:
            setattr(self, name, fields[name])

    def as_dict(self) -> dict[str, object]:
        """The attributes as a dict of JSON-able values."""
        found = {name: getattr(self, name) for name in sorted(Status.__slots__)}
        for name in ("hooked", "mlx_notes", "reasons"):
            found[name] = list(found[name])
        return found

    def __repr__(self) -> str:
        if not self.installed:
            return "<mlx_safe: not installed>"
        hooks = "hooks verified" if self.verified else "no Metal hooks"
        return f"<mlx_safe: {self.mode}, {hooks}, {len(self.reasons)} reasons>"


class _State:
    def __init__(self) -> None:
        self.installed = False
        self.mode: str | None = None
        self.on_terminate: str | None = None
        self.report_dir: str | None = None
        self.reasons: list[str] = []


_state = _State()


def mlx_version() -> str | None:
    """Version of the mlx that this process has imported or would import."""
    return _loaded_mlx() or installed_versions("mlx")["mlx"]


def _loaded_mlx() -> str | None:
    loaded = sys.modules.get("mlx.core")
    return str(getattr(loaded, "__version__", "")) or None


def _version_by_import() -> tuple[str | None, str]:
    """(version of an mlx with no metadata beside it; or None and why there is none).

    So it is with a build tree on PYTHONPATH and with an editable install. Its import
    takes tens of milliseconds, but a regime that is guessed wrong is an abort.
    """
    from ._command import CommandError, need_mlx

    try:
        need_mlx()
    except CommandError as e:
        return None, str(e)
    return _loaded_mlx(), ""


def installed_versions(*packages: str) -> dict[str, str | None]:
    """Versions of what ``import package`` would find; None: nothing.

    Not by importing it, which takes tens of milliseconds, nor by
    importlib.metadata, which takes as long.
    """
    found: dict[str, str | None] = dict.fromkeys(packages)
    missing = list(packages)
    for entry in sys.path:
        here = [p for p in missing if _is_whole(os.path.join(entry, p))]
        # Listed once, and only here: site-packages has hundreds of names.
        beside = _names_in(entry or ".") if here else []
        for package in here:
            found[package] = _version_of(package, beside)
            missing.remove(package)  # this is the one that is imported
    return found


def _names_in(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_whole(directory: str) -> bool:
    """Whether a package is here; mlx, a namespace, is where its core is."""
    # `access` raises nothing; most of sys.path has neither.
    if os.access(os.path.join(directory, "__init__.py"), os.F_OK):
        return True
    if not os.access(directory, os.F_OK):
        return False
    return any(name.startswith("core.") for name in _names_in(directory))


def _version_of(package: str, beside: list[str]) -> str | None:
    """As the metadata among the names ``beside`` it has it; None: there is none."""
    for name in beside:
        if name.startswith(f"{package}-") and name.endswith(".dist-info"):
            return name[len(package) + 1 : -len(".dist-info")]
    return None


def _versions() -> tuple[dict[str, str | None], list[str]]:
    """(versions of mlx and mlx_lm, and why there is no mlx)."""
    versions = installed_versions("mlx", "mlx_lm")
    versions["mlx"] = _loaded_mlx() or versions["mlx"]
    if versions["mlx"] is not None:
        return versions, []
    versions["mlx"], no_mlx = _version_by_import()
    return versions, [no_mlx] if no_mlx else []


def _regime(mode: str, version: str | None) -> str:
    if mode != "auto":
        return mode
    return _mlx_versions.behaviour_of(version).regime


def _report_dir() -> tuple[str | None, str | None]:
    """(directory of the crash reports, made if need be; or None and why)."""
    wanted = _paths.report_dir()
    if not os.path.isabs(wanted):
        return None, (
            f"no crash reports: {wanted} is no absolute path; set "
            "MLX_SAFE_REPORT_DIR to one"
        )
    longest = _core.report_directory_max()
    if len(os.fsencode(wanted)) > longest:
        return None, f"no crash reports: its path is longer than {longest}: {wanted}"
    try:
        os.makedirs(wanted, mode=0o700, exist_ok=True)
    except OSError as e:
        return None, f"no crash reports: cannot make {wanted}: {e.strerror}"
    if not os.access(wanted, os.W_OK | os.X_OK):
        return None, f"no crash reports: cannot write to {wanted}"
    return wanted, None


_reports_tended = False


def _is_our_command() -> bool:
    """Whether this is ``mlx-safe``, which shows reports in its own time."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    started = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return program == "mlx-safe" or ("-m", "mlx_safe") in started


def _tend_reports(directory: str) -> str | None:
    """Looks, once in a process, at what those before have left; why not."""
    global _reports_tended
    if _reports_tended:
        return None
    _reports_tended = True
    try:
        if _paths.has_news(directory):
            from .forensics import startup

            startup.tend(directory, quietly=_is_our_command())
    except Exception as e:
        # Whatever lies there, it is no reason not to protect this process.
        return f"the crash reports were not looked at: {e!r}"
    return None


def _check(mode: str, on_terminate: str, drain_seconds: float) -> None:
    if mode not in ("auto", "intercept", "observe"):
        raise ValueError(f'mode must be "auto", "intercept" or "observe", not {mode!r}')
    if on_terminate not in ("report", "drain"):
        raise ValueError(
            f'on_terminate must be "report" or "drain", not {on_terminate!r}'
        )
    if not 0 < drain_seconds <= 3600:
        raise ValueError(
            f"drain_seconds must be over 0 and at most 3600, not {drain_seconds!r}"
        )


def install(
    mode: Literal["auto", "intercept", "observe"] = "auto",
    on_terminate: Literal["report", "drain"] = "report",
    *,
    drain_seconds: float = 10.0,
    signals: bool = False,
) -> Status:
    """Protects this process. Calling it again changes the settings.

    Args:
        mode: how the running MLX treats a fault. ``"auto"`` chooses by the
            installed mlx: intercept below 0.32.0, observe from there on.
        on_terminate: what happens when an exception reaches std::terminate.
            ``"report"``: a crash report is written and the process dies as it
            would have. ``"drain"``: the thread is parked, the callbacks of
            ``on_fault(…, drains=True)`` answer the clients, and the process leaves
            with status 75; at once when there are none.
        drain_seconds: how long a parked thread waits before it exits anyway.
        signals: SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGTRAP leave a crash
            report, too. Then the handlers that were there before run (faulthandler's
            for one), or the signal does what it would have done. A signal that is
            ignored is left alone. The calling thread, with what it starts from then on,
            blocks none of them any more, and its stack overflow is covered.

    Never fails because of the machine: what cannot be active is named in the
    returned `Status`.

    Raises:
        ValueError: an argument is none of the above.
    """
    _check(mode, on_terminate, drain_seconds)
    with _lock:
        versions, reasons = _versions()
        report_dir, why_not = _report_dir()
        if why_not:
            reasons.append(why_not)
        _core.terminate_install(on_terminate == "drain", drain_seconds)
        regime = _regime(mode, versions["mlx"])
        metal = _core.metal_install(regime == "intercept")
        reasons += metal["reasons"]
        if metal["runtime"] and not metal["verified"]:
            # There is a Metal, so its faults are what the user counts on us for.
            _warn(metal["reasons"])
        if report_dir and (why_not := _tend_reports(report_dir)):
            reasons.append(why_not)
        if not _state.installed:
            _register_fork_handler()
        _state.installed = True
        _state.mode = regime
        _state.on_terminate = on_terminate
        _state.report_dir = report_dir
        _state.reasons = reasons
        _set_signals(signals)
        _start_reports(report_dir, versions)
        if signals:
            _unblock_crashes()
        if metal["active"]:
            _reports.watch_faults()
        return status()


def _set_signals(wanted: bool) -> None:
    if wanted:
        _core.signals_install()
    else:
        _core.signals_uninstall()


def _unblock_crashes() -> None:
    """Of a crash whose signal is blocked the kernel calls no handler.

    A child has the mask of what started it. One that was sent meanwhile comes now, so
    its report can be written by now.
    """
    import signal  # here: an `import mlx_safe` alone need not take its 0.4 ms

    crashes = [signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS]
    crashes += [signal.SIGILL, signal.SIGFPE, signal.SIGTRAP]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, crashes)


# Of `Status`, what is no setting but a count, or stands elsewhere in a report.
_NOT_OF_THE_HOOKS = (
    "dropped",
    "epoch",
    "mlx_notes",
    "mlx_version",
    "reports_failed",
    "reports_suppressed",
    "reports_written",
)


def _start_reports(report_dir: str | None, versions: dict[str, str | None]) -> None:
    hooks = {
        name: value
        for name, value in status().as_dict().items()
        if name not in _NOT_OF_THE_HOOKS and value is not None and value != []
    }
    versions = {name: v for name, v in versions.items() if v is not None}
    why_not = _reports.start(report_dir, {**versions, "hooks": hooks})
    if why_not:
        _state.reasons.append(why_not)


def _warn(reasons: list[str]) -> None:
    import warnings

    warnings.warn(
        f"mlx_safe: {'; '.join(reasons)}. Faults of the GPU are not intercepted.",
        RuntimeWarning,
        stacklevel=3,
    )


def uninstall() -> None:
    """Puts everything back as it was before `install`. The log stays."""
    with _lock:
        _reports.stop()
        _core.signals_uninstall()
        _core.metal_uninstall()
        _core.terminate_uninstall()
        _state.__init__()  # type: ignore[misc]


def require() -> Status:
    """Raises unless faults of the GPU are caught in this process.

    For a program that must not run unprotected. On a machine without Metal there
    are no command buffers to hook, and nothing is raised.

    Returns:
        What `status` says.

    Raises:
        RuntimeError: `install` was not called, or the hooks are not verified; the
            message names the reasons.
    """
    found = status()
    if not found.installed:
        raise RuntimeError("mlx_safe is not installed: call mlx_safe.install()")
    if _core.metal_status()["runtime"] and not found.verified:
        why = "; ".join(found.reasons)
        raise RuntimeError(f"faults of the GPU are not caught here: {why}")
    return found


def regime() -> str | None:
    """``"intercept"`` or ``"observe"``; None when it is not installed. Any thread."""
    return _state.mode


def status() -> Status:
    """What is active, and for what is not, why."""
    with _lock:
        installed = _state.installed
        metal = _core.metal_status()
        reasons = _state.reasons
        if not installed:
            # What could not be taken out has its reason, too.
            left = metal["reasons"] if metal["hooked"] else []
            reasons = ["not installed: call install()", *left]
        else:
            # What came up since: a class too many, a fork.
            reasons = [*reasons, *(r for r in metal["reasons"] if r not in reasons)]
        reports_written, reports_failed = _core.report_counts()
        version = mlx_version()
        return Status(
            installed=installed,
            mode=_state.mode,
            on_terminate=_state.on_terminate,
            terminate_handler=_core.terminate_installed(),
            metal_hooks=metal["active"],
            verified=metal["verified"],
            hooked=tuple(metal["hooked"]),
            runtime=metal["runtime"],
            mlx_version=version,
            mlx_notes=_mlx_versions.notes_of(version),
            report_dir=_state.report_dir,
            signals=_core.signals_installed(),
            reports_written=reports_written,
            reports_failed=reports_failed,
            reports_suppressed=_reports.suppressed(),
            epoch=_core.epoch(),
            dropped=_core.dropped(),
            reasons=tuple(reasons),
        )


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    _faults.after_fork_in_child()
    _reports.after_fork_in_child()


_fork_handler_registered = False


def _register_fork_handler() -> None:
    global _fork_handler_registered
    if not _fork_handler_registered:
        os.register_at_fork(after_in_child=_after_fork_in_child)
        _fork_handler_registered = True
