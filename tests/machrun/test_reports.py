"""Crash reports of a Mac's process: terminate, signals, a stack that overflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.programs import program

from .runner import Machine

MACHINE = Machine(mlx="0.31.2")


def only_report(directory: Path) -> dict[str, Any]:
    (path,) = [p for p in directory.glob("*.json") if not p.name.startswith("run-")]
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["complete"]
    return report


def symbols(report: dict[str, Any]) -> str:
    return " ".join(str(frame["symbol"]) for frame in report["native_stack"])


def test_an_exception_on_a_foreign_thread(private_reports: Path) -> None:
    done = MACHINE.run(program("mac_throws_on_a_thread"))
    assert done.returncode == -6, done.stderr
    report = only_report(private_reports)
    assert report["why"] == "terminate"
    assert report["exception_type"] == "St13runtime_error"
    assert "thrown here" in report["exception_message"]
    assert "__cxa_throw" in symbols(report)
    images = {Path(f["image"]).name for f in report["native_stack"] if f["image"]}
    assert {"cxxrt.dylib", "_core.cpython-311-darwin.so"} <= images


def test_a_signal_in_code_for_macos(private_reports: Path) -> None:
    """The stack goes from the handler through the signal's frame to what crashed."""
    done = MACHINE.run(program("mac_crashes_in_metal"))
    assert done.returncode == -11, done.stderr
    report = only_report(private_reports)
    assert report["signal"]["name"] == "SIGSEGV"
    assert report["signal"]["address"] == "0x10"
    crashed, caller = report["native_stack"][:2]
    assert crashed["symbol"] == "metalsim_lookup_imp"
    assert caller["symbol"] == "objc_msgSend"
    assert crashed["image"].endswith("/metalsim.dylib")


def test_a_stack_that_overflows(private_reports: Path) -> None:
    done = MACHINE.run("""
        import faulthandler, mlx_safe
        mlx_safe.install(signals=True)
        faulthandler._stack_overflow()
    """)
    assert done.returncode == -11, done.stderr
    report = only_report(private_reports)
    assert report["signal"]["name"] == "SIGSEGV"
