"""What was built of tests/native, and Python on the simulated Metal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import child
from support.programs import PROGRAMS, with_suite


@dataclass
class Native:
    """Paths of what was built, and the environment that loads it."""

    directory: Path

    @property
    def runtime(self) -> str:
        return str(self.directory / "metalsim" / "libmetalsim.so")

    @property
    def hooks(self) -> str:
        return str(self.directory / "libmlx_safe_hooks_checked.so")

    @property
    def twin(self) -> str:
        return str(self.directory / "libmlx_safe_hooks_twin.so")

    @property
    def full_disk(self) -> str:
        return str(self.directory / "libfull_disk.so")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.directory / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env={**os.environ, "MLX_SAFE_METAL_RUNTIME": self.runtime},
        )

    def host(
        self, regime: str, workload: str, *more: str, hooks: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = [f"metalsim/host_{regime}", f"--workload={workload}"]
        if hooks:
            command.append(f"--hooks={self.hooks}")
        return self.run(*command, "--time-limit=300", *more)


PYTHON = """
    import ctypes, os, time
    from support.simulated import fail_next, sim
    {before}
    import mlx_safe
    from mlx_safe import _core, testing
    status = mlx_safe.status()
"""


def in_python(
    native: Native, code: str, before: str = "", **environment: Any
) -> subprocess.CompletedProcess[str]:
    text = PYTHON.format(before=before) + code
    return child.run(text, **_loads(native), **environment)


def run_on_metal(
    native: Native, name: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``tests/programs/NAME.py`` on the simulated Metal."""
    return subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **_loads(native), **environment},
        check=False,
    )


def _loads(native: Native) -> dict[str, Any]:
    return {"MLX_SAFE_METAL_RUNTIME": native.runtime, "PYTHONPATH": with_suite()}
