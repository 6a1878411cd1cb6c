"""Processes that died without a report: SIGKILL, out of memory, loss of power.

While a process lives, ``run-<pid>.json`` lies in the directory: who it is and its
last memory figures. A clean end removes it, and so does a written report. One that
is left over, its process gone, becomes the report ``why: "died"``.

Renaming it is the claim: of several processes that start at once, one succeeds.
"""

from __future__ import annotations

import json
import logging
import os
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
        if pid is None or not path.is_file():
            continue
        if not _paths.process_lives(str(path), pid):
            made.append(_adopt(path, pid))
    return [report for report in made if report is not None]


def _adopt(run_file: Path, pid: int) -> Path | None:
    try:
        written = run_file.stat().st_mtime
        run = reader.read(run_file)
        report = store.name_for(run_file.parent, int(written), pid)
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


def _complete(path: Path, run: Report) -> None:
    """Makes a report of the run file that is now called ``path``.

    Nobody else does: the renaming was the claim. If it fails, the last figures
    can still be read.
    """
    run.schema, run.why, run.complete = records.SCHEMA, "died", True
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(run.members(), file)
            file.write("\n")
        temporary.replace(path)
    except OSError as e:
        log.warning("cannot complete %s: %s", path, e.strerror)
