"""Child processes that die, and what they leave in the directory of the reports."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

from . import child

Done = subprocess.CompletedProcess[str]

SIGNALS = """
    import ctypes, faulthandler, os, signal, sys, threading, time
    import mlx_safe
    from mlx_safe import _core, testing
    {before}
    mlx_safe.install(signals=True)
    mlx_safe.breadcrumb("about to die", attempt=1)
"""


def die(code: str, before: str = "", **environment: Any) -> Done:
    """Runs ``code`` in a child that has signals installed."""
    return child.run(SIGNALS.format(before=before) + code, **environment)


def paths(directory: Path) -> list[Path]:
    """The reports, the first of a process before its second."""
    found = [p for p in directory.glob("*.json") if not p.name.startswith("run-")]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def only_report(directory: Path) -> dict[str, Any]:
    (path,) = paths(directory)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    report: dict[str, Any] = json.loads(path.read_bytes())
    assert report["complete"] is True
    assert path.name.startswith(f"{report['time_ns'] // 10**9}-{report['pid']}")
    return report


def left_over(directory: Path) -> list[str]:
    """Whatever else lies there: a report that was written leaves nothing."""
    return sorted(p.name for p in directory.iterdir() if p not in paths(directory))
