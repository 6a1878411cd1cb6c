"""Sample crash reports, made in code, and what can be done with any."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_safe.forensics import export, records, words

NOW_NS = 1_795_245_857_434_634_866
GIB = 1 << 30


def sample(**changes: Any) -> dict[str, Any]:
    """A report of a fault with every member; ``changes`` replaces members."""
    second = 1_000_000_000
    report: dict[str, Any] = {
        "schema": 1,
        "why": "fault",
        "time_ns": NOW_NS,
        "pid": 4242,
        "thread": 4250,
        "python_thread": "0x7f51a2bc6700",
        "argv0": "mlx-safe",
        "started_ns": NOW_NS - 3725 * second,
        "signal": {
            "number": 11,
            "name": "SIGSEGV",
            "sent_by": 4242,
            "address": "0x10",
        },
        "exception_type": "St13runtime_error",
        "exception_message": 'a "quoted" message, é\n and a second line',
        "code": 8,
        "name": "kIOGPUCommandBufferCallbackErrorOutOfMemory",
        "policy": "drain",
        "epoch": 3,
        "second": False,
        "unwritten": False,
        "memory": {
            "time_ns": NOW_NS - second,
            "active": 17 * GIB,
            "peak": 18 * GIB,
            "cache": GIB,
            "footprint": 19 * GIB,
            "ceiling": 18 * GIB,
            "system_total": 24 * GIB,
            "system_available": -1,
        },
        "memory_history": [
            [NOW_NS - (10 - i) * second, (8 + i) * GIB, 18 * GIB] for i in range(10)
        ],
        "context": {
            "mlx_safe": "0.1.0",
            "mlx": "0.31.2",
            "os": "macOS 26.1",
            "hooks": {"mode": "intercept", "report_dir": "/Users/jane/reports"},
        },
        "requests": [
            {
                "id": "chatcmpl-1",
                "path": "/v1/chat/completions",
                "prompt_tokens": 900,
                "prefilled": 900,
                "tokens": 12,
                "age_ms": 1500,
            }
        ],
        "breadcrumbs": [
            {
                "time_ns": NOW_NS - 2 * second,
                "thread": 4250,
                "kind": "request",
                "text": "started",
                "fields": {"prompt_tokens": 900},
            },
            {
                "time_ns": NOW_NS - second,
                "thread": 4250,
                "kind": "note",
                "text": "the program's own",
                "fields": {"customer": "ACME"},
            },
        ],
        "command_buffers": [
            {
                "number": 812,
                "queue": "0x600000",
                "label": "prefill",
                "status": "error",
                "code": 8,
                "time_ns": NOW_NS - second // 2,
                "gpu_start_s": 100.25,
                "gpu_end_s": 100.5,
            }
        ],
        "faults": [
            {
                "number": 3,
                "code": 8,
                "message": "[METAL] Command buffer execution failed",
                "source": "metal",
                "time_ns": NOW_NS,
                "thread": 4251,
                "buffer": 812,
                "queue": "0x600000",
                "label": "prefill",
                "gpu_start_s": 100.25,
                "gpu_end_s": 100.5,
            }
        ],
        "native_stack": [
            {
                "address": "0x1000",
                "image": "/Users/jane/venv/libmlx.dylib",
                "offset": "0x10",
                "symbol": "check_error",
            },
            {"address": "0x2000", "image": None, "offset": None, "symbol": None},
        ],
        "python_stacks": 'Thread 0x1 (most recent call first):\n  File "/Users/jane/'
        'app.py", line 3 in serve\n',
        "complete": True,
    }
    return {**report, **changes}


def write(directory: Path, report: Any, name: str = "1795245857-4242.json") -> Path:
    """Puts ``report`` (bytes as they are, else as JSON) into the directory."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / name
    data = report if isinstance(report, bytes) else json.dumps(report).encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    return path


DOCS = Path(__file__).parent.parent.parent / "docs" / "reports.md"
TYPES: dict[str, type] = {
    "int": int,
    "text": str,
    "float": float,
    "bool": bool,
    "object": dict,
    "list": list,
}


def documented() -> dict[str, str]:
    """The members of the table in docs/reports.md, with their types."""
    row = re.compile(r"^\| `([a-z0-9_.\[\]]+)` \| (\w+) \|", re.M)
    return dict(row.findall(DOCS.read_text()))


def members_of(report: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """All members of a report as the table names them; not what is free-form."""
    for name, value in report.items():
        yield where + name, value
        if isinstance(value, dict) and name not in ("context", "fields"):
            yield from members_of(value, f"{where}{name}.")
        if isinstance(value, list) and name not in ("memory_history", "left_out"):
            for row in value:
                yield from members_of(row, f"{where}{name}[].")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def a_pid_that_is_gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(300)
    return process.pid


def run_file(directory: Path, pid: int, **changes: Any) -> Path:
    kept = ("schema", "time_ns", "memory", "memory_history", "context", "requests")
    members = {name: sample()[name] for name in kept}
    members |= {"why": "running", "pid": pid, **changes}
    return write(directory, {**members, "complete": True}, f"run-{pid}.json")


def every_way_to_show(report: records.Report) -> None:
    """What the command does with any report; none of it may raise."""
    json.dumps(report.as_dict())
    json.dumps(export.exported(report))
    json.dumps(export.exported(report, with_fields=True))
    assert words.headline(report)
    words.advice(report)
    for section in words.sections(report):
        assert section.rows
        for row in section.rows:
            for cell in row:
                assert isinstance(cell, str)
                cell.encode()
                assert "\x1b" not in cell
