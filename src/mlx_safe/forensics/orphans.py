"""Processes that died without a report: SIGKILL, out of memory, loss of power.

While a process lives, ``run-<pid>.json`` lies in the directory: who it is and its
last memory figures. A clean end removes it, and so does a written report. One that
is left over, its process gone, becomes the report ``why: "died"``.

Renaming it is the claim: of several processes that start at once, one succeeds.

A process that crashed while the disk was full leaves an empty report beside it:
then the run file takes the place of that.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

from .. import _paths
from . import reader, records, store
from .records import Report

__all__ = ["adopt"]

log = logging.getLogger("mlx_safe")


def adopt(directory: str | os.PathLike[str]) -> list[Path]:
    """Makes reports of the run files whose process is gone; returns those made.

    To be called before this process writes its own run file: in a container the
    next process often has the number of the one that died.

    Raises:
        OSError: the directory cannot be read.
    """
    try:
        found = list(Path(directory).iterdir())
    except FileNotFoundError:
        return []
    made = []
    for path in found:
        pid = _paths.owner_of(path.name)
        if pid is None or not _is_a_file_of_its_own(path):
            continue
        if not _paths.process_lives(str(path), pid):
            made.append(_adopt(path, pid))
    return [report for report in made if report is not None]


def _is_a_file_of_its_own(path: Path) -> bool:
    """Where others may write to the directory, a link would be what we overwrite."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False  # another process was faster
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _adopt(run_file: Path, pid: int) -> Path | None:
    try:
        written = run_file.stat().st_mtime
        run = reader.read(run_file)
        report = _empty_report(run_file.parent, int(written), pid)
        run.unwritten = report is not None
        report = report or store.name_for(run_file.parent, int(written), pid)
        run_file.rename(report)
    except FileNotFoundError:
        return None  # another process was faster
    except OSError as e:
        log.warning("cannot make a report of %s: %s", run_file, e.strerror)
        return None
    # What it was writing when it died.
    run_file.with_name(f".run-{pid}").unlink(missing_ok=True)
    run.time_ns = run.time_ns or int(written * 1e9)
    run.pid = pid
    _complete(report, run)
    return report


def _empty_report(directory: Path, since: int, pid: int) -> Path | None:
    """That of the death of ``pid``, not of one who had the number before."""
    for entry in store.entries(directory):
        if entry.pid == pid and entry.size == 0 and entry.seconds >= since:
            return entry.path
    return None


def _complete(path: Path, run: Report) -> None:
    """Makes a report of the run file that is now called ``path``.

    Nobody else does: the renaming was the claim. It is written in its place, which
    goes on a full disk, too. If it fails, the last figures can still be read.
    """
    run.schema, run.why, run.complete = records.SCHEMA, "died", True
    text = json.dumps(run.members(), separators=(",", ":")) + "\n"
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "r+b", buffering=0) as file:
            file.truncate(file.write(text.encode()))
    except OSError as e:
        log.warning("cannot complete %s: %s", path, e.strerror)
