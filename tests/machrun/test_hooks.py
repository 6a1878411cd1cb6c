"""Our wheels' hooks on real MLX binaries: every fault is told, nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .runner import LIMIT_S, Machine
from .setup.packages import NEWEST
from .setup.places import ALL, HERE

FAULTS, THREADS_S = 60, 1.5

MACHINES = {
    "0.30.6": Machine(mlx="0.30.6"),
    "0.31.2": Machine(mlx="0.31.2"),
    # MLX has a wheel for each macOS, built apart, and pip takes the newest that fits.
    "0.31.2 macOS 15": Machine(mlx="0.31.2", macos="15.0", system="15_0"),
    "0.32.1": Machine(mlx="0.32.1"),
    "0.32.4": Machine(mlx="0.32.4"),
    "newest macOS 26.2": Machine(mlx=NEWEST, macos="26.2", system="26_0"),
    "0.32.4 cp310 3.10": Machine(mlx="0.32.4", python="3.10"),
    "0.32.4 cp312-abi3 3.13": Machine(mlx="0.32.4", python="3.13"),
}
# It starts slowly, and test_loader.py installs the hooks on it in any case.
if ALL:
    MACHINES["0.32.4 cp312-abi3 3.14"] = Machine(mlx="0.32.4", python="3.14")


@pytest.mark.parametrize("name", MACHINES)
def test_every_fault_is_told(name: str, private_reports: Path) -> None:
    machine = MACHINES[name]
    program = [str(HERE / "python"), str(HERE / "guest" / "sweep.py")]
    done = subprocess.run(
        [*program, str(FAULTS), str(FAULTS), str(THREADS_S)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **machine.environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    early = machine.version < "0.32"
    assert found["mode"] == ("intercept" if early else "observe")
    assert found["verified"] and found["reasons"] == []
    for sweep in (found["over the CPU"], found["on the GPU"]):
        assert sweep["faults"] == sweep["told"] == FAULTS
        assert sweep["silent"] == sweep["untrue"] == sweep["other"] == 0, done.stderr
    threads = found["threads"]
    assert threads["failed"] > 0 and threads["told"] > 0 and threads["other"] == 0
    counters = found["counters"]
    assert counters["gate_limit"] == 0
    assert (counters["swallowed"] > 0) == early


def test_uninstalled_it_is_as_it_was() -> None:
    done = Machine(mlx="0.32.4").run("""
        import machpy, ctypes, mlx_safe, mlx.core as mx
        mlx_safe.install()
        mx.eval(mx.exp(mx.array([1.0])))
        count = machpy.simulator("metalsim_modified_methods", ctypes.c_uint32)
        before = count()
        mlx_safe.uninstall()
        mx.eval(mx.exp(mx.array([1.0])))
        print(before > 0, count())
    """)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_in_a_forked_child_nothing_is_hooked() -> None:
    done = Machine(mlx="0.32.4").run("""
        import os, mlx_safe
        mlx_safe.install()
        child = os.fork()
        if child == 0:
            print(mlx_safe.install().reasons, flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """)
    said, status = done.stdout.splitlines()
    assert "forked" in said and status == "0", done.stdout + done.stderr
