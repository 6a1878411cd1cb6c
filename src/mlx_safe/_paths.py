"""Where crash reports go, and whether something new is there.

Read at import of the package, so without platformdirs, whose import alone takes
longer than all of mlx-safe's (13 ms, measured). A test holds this against platformdirs
on the system it runs on.
"""

from __future__ import annotations

import os
import sys
import time

__all__ = ["ANNOUNCED", "SEEN", "has_news", "owner_of", "process_lives", "report_dir"]

# Suffixes of the empty markers beside a report: somebody looked at it; some
# process said in its log that it is there.
SEEN = ".seen"
ANNOUNCED = ".told"


def report_dir() -> str:
    """``MLX_SAFE_REPORT_DIR``, or ``reports`` in the user's state directory.

    Absolute: a process that changes its working directory writes where it began.
    Only where there is no home directory or no working directory it is not.
    """
    wanted = os.environ.get("MLX_SAFE_REPORT_DIR")
    if not wanted:
        wanted = os.path.join(_state_dir(), "mlx-safe", "reports")
    # Who starts us without a shell (launchd, a container) leaves it as it is.
    wanted = os.path.expanduser(wanted)
    # There is none. A directory called "~" is the last thing to make.
    if os.path.isabs(wanted) or wanted.startswith("~"):
        return wanted
    try:
        return os.path.join(os.getcwd(), wanted)
    except OSError:  # it was removed: the next to write there will say so
        return wanted


def has_news(directory: str) -> bool:
    """Whether there is a report without a line in a log, or one to be made.

    The latter of a run file whose process is gone. Asked at import of the
    package: some 20 µs, and as much for each process that lives.

    Raises:
        OSError: the directory cannot be read.
    """
    names = os.listdir(directory)
    marked = {n.rpartition(".")[0] for n in names if n.endswith((SEEN, ANNOUNCED))}
    for name in names:
        if not name.endswith(".json") or name in marked:
            continue
        pid = owner_of(name)
        if pid is None:  # a report, or no file of mlx-safe
            if name.removesuffix(".json").replace("-", "").isdecimal():
                return True
        elif not process_lives(os.path.join(directory, name), pid):
            return True
    return False


def owner_of(name: str) -> int | None:
    """The process whose run file has this name; None: it is no run file."""
    number = name.removeprefix("run-").removesuffix(".json")
    if name != f"run-{number}.json" or not number.isascii():
        return None
    return int(number) if number.isdecimal() and len(number) <= 10 else None


def process_lives(run_file: str, pid: int) -> bool:
    """Whether process ``pid``, if there is one, is the one that wrote ``run_file``.

    A number is used again, after a reboot above all, and in a container at every
    start: then the process began after the file was written.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's, as low numbers are after a boot
    try:
        return _began(pid) <= os.stat(run_file).st_mtime
    except OSError:
        return True  # hidden from us, or the file was removed just now


def _began(pid: int) -> float:
    """Unix time before which the process cannot have begun.

    Infinity for one that has ended and was not waited for. A clock that was set
    since then makes it wrong by as much.
    """
    if sys.platform != "linux":
        # macOS: the boot (clock_gettime(3)). To ask for more takes milliseconds.
        return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    with open(f"/proc/{pid}/stat") as file:
        # proc_pid_stat(5); the program's name, in brackets, may hold anything.
        state, *rest = file.read().rpartition(")")[2].split()
    if state == "Z":
        return float("inf")
    since_boot = int(rest[18]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


def _state_dir() -> str:
    xdg = os.environ.get("XDG_STATE_HOME", "").strip()
    if xdg:
        return xdg
    if sys.platform == "darwin":
        return "~/Library/Application Support"
    return "~/.local/state"
