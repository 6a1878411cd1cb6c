"""Our wheels' hooks on real MLX binaries: every fault is told, nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.programs import program

from .runner import LIMIT_S, Machine
from .setup.packages import NEWEST, VERSIONS
from .setup.places import CACHE, HERE, MAIN, PYTHONS, ROOT

FAULTS, THREADS_S = 60, 1.5
DOCS = ROOT / "docs" / "machrun.md"
START, END = "<!-- written by make machrun-sweep -->\n", "<!-- end of sweeps -->\n"

# Names without blanks, for `make machrun-sweep SWEPT="ONE ANOTHER"`.
MACHINES = {
    "0.30.6": Machine(mlx="0.30.6"),
    "0.31.2": Machine(mlx="0.31.2"),
    # MLX has a wheel for each macOS, built apart, and pip takes the newest that fits.
    "0.31.2-macOS-15": Machine(mlx="0.31.2", macos="15.0", system="15_0"),
    "0.32.1": Machine(mlx="0.32.1"),
    "0.32.4": Machine(mlx="0.32.4"),
    "newest-macOS-26.2": Machine(mlx=NEWEST, macos="26.2", system="26_0"),
    # Each of our other wheels, with hooks of either mode.
    "0.31.2-cp310": Machine(mlx="0.31.2", python="3.10"),
    "0.32.4-cp310": Machine(mlx="0.32.4", python="3.10"),
    "0.31.2-abi3-3.12": Machine(mlx="0.31.2", python="3.12"),
    "0.32.4-abi3-3.12": Machine(mlx="0.32.4", python="3.12"),
    "0.32.4-abi3-3.13": Machine(mlx="0.32.4", python="3.13"),
    "0.31.2-abi3-3.14": Machine(mlx="0.31.2", python="3.14"),
}


def swept(
    machine: Machine, over_cpu: int, on_gpu: int, seconds: float, limit_s: float
) -> dict[str, Any]:
    """What guest/sweep.py counts."""
    numbers = (str(over_cpu), str(on_gpu), str(seconds))
    done = subprocess.run(
        [HERE / "python", HERE / "guest" / "sweep.py", *numbers],
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, **machine.environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_every_fault_is_told(name: str, private_reports: Path) -> None:
    machine = MACHINES[name]
    found = swept(machine, FAULTS, FAULTS, THREADS_S, LIMIT_S)
    early = machine.version < "0.32"
    assert found["mode"] == ("intercept" if early else "observe")
    assert found["verified"] and found["reasons"] == []
    for sweep in (found["over the CPU"], found["on the GPU"]):
        assert sweep["faults"] == sweep["told"] == FAULTS
        assert sweep["silent"] == sweep["untrue"] == sweep["other"] == 0, found
    threads = found["threads"]
    # Each buffer that failed was of an evaluation, and each of those raised.
    assert threads["failed"] == threads["planned"] >= threads["faults"] > 0
    assert threads["told"] == threads["faults"], found
    assert threads["silent"] == threads["untrue"] == threads["other"] == 0, found
    counters = found["counters"]
    assert counters["gate_limit"] == 0
    assert (counters["swallowed"] > 0) == early


def test_uninstalled_it_is_as_it_was() -> None:
    done = Machine(mlx="0.32.4").run(program("mac_takes_the_hooks_out"))
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_in_a_forked_child_nothing_is_hooked() -> None:
    done = Machine(mlx="0.32.4").run(program("mac_forks"))
    said, status = done.stdout.splitlines()
    assert "forked" in said and status == "0", done.stdout + done.stderr


# ---- the table of docs/machrun.md: `make machrun-sweep` -----------------------

# Also each version of MLX with each of our wheels, and each Python with both modes.
WHEELS = {MAIN: "", "3.10": "-cp310", "3.12": "-abi3-3.12"}
SWEPT = {
    **MACHINES,
    **{
        version + mark: Machine(mlx=version, python=python)
        for version in VERSIONS
        for python, mark in WHEELS.items()
    },
    "0.31.2-abi3-3.13": Machine(mlx="0.31.2", python="3.13"),
    "0.32.4-abi3-3.14": Machine(mlx="0.32.4", python="3.14"),
}
MANY, FEW, MANY_THREADS_S, MANY_LIMIT_S = 10_000, 60, 20.0, 7200.0
COUNTED = ("faults", "told", "silent", "untrue", "other")


def key_of(machine: Machine) -> str:
    """How its row begins."""
    python = PYTHONS[machine.python]
    wheel = python.wheel.partition("-")[2]
    wheel = f"{python.wheel} ({python.version})" if wheel == "abi3" else wheel
    return f"| {machine.version} | {wheel} | {machine.macos} |"


def row_of(machine: Machine) -> str:
    """Where evaluations over the CPU's stream would end it, they are few or none."""
    version = machine.version
    counts = (MANY, 0) if version < "0.32" else (FEW, MANY)
    counts = (0, MANY) if version == "0.32.0" else counts
    found = swept(machine, *counts, MANY_THREADS_S, MANY_LIMIT_S)
    parts = found["over the CPU"], found["on the GPU"]
    threads = found["threads"]
    cells = [f"{sum(part[name] for part in parts):,}" for name in COUNTED]
    cells += [f"{threads[name]:,}" for name in COUNTED[:3]]
    assert threads["failed"] == threads["planned"], threads
    assert threads["untrue"] == threads["other"] == 0, threads
    return f"{key_of(machine)} {' | '.join(cells)} |\n"


def test_each_wheel_was_swept_with_each_version() -> None:
    assert {PYTHONS[python].wheel for python in WHEELS} == {
        python.wheel for python in PYTHONS.values()
    }
    rows = DOCS.read_text().split(START)[1].split(END)[0].splitlines()
    for version in VERSIONS:
        for python in WHEELS:
            key = key_of(Machine(mlx=version, python=python))
            found = [row for row in rows if row.startswith(key)]
            assert len(found) == 1, f"{key}: see `make machrun-sweep`"
            cells = [cell.strip().replace(",", "") for cell in found[0].split("|")]
            failed, raised, *wrong = map(int, cells[4:9])
            assert failed == raised >= MANY and wrong == [0, 0, 0], found[0]


def write(names: list[str]) -> None:
    """Puts each row into the docs as soon as it is known."""
    # Not into the user's own folder.
    os.environ.setdefault("MLX_SAFE_REPORT_DIR", str(CACHE / "reports"))
    if unknown := [name for name in names if name not in SWEPT]:
        line = f"machrun: no row {' '.join(unknown)}: there are {' '.join(SWEPT)}"
        print(line, file=sys.stderr)
        sys.exit(2)
    for name in names or SWEPT:
        row = row_of(SWEPT[name])
        before, rest = DOCS.read_text().split(START)
        table, after = rest.split(END)
        head, rows = table.splitlines(True)[:2], table.splitlines(True)[2:]
        key = key_of(SWEPT[name])
        rows = sorted([*(r for r in rows if not r.startswith(key)), row])
        DOCS.write_text(f"{before}{START}{''.join([*head, *rows])}{END}{after}")
        print(f"machrun: {name}: {row}", end="")


if __name__ == "__main__":
    write(sys.argv[1:])
