"""The simulated Metal as a package: its wheel, built, installed and loaded."""

from __future__ import annotations

import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.programs import program

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "packages" / "mlx-safe-metalsim"
USE = program("uses_the_simulated_metal")


def test_the_wheel_is_built_installed_and_loaded(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the simulated Metal is built for Linux")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    done = subprocess.run(
        [*command, str(tmp_path), str(PACKAGE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info" not in name]
        archive.extractall(target)
    assert sorted(names) == [
        "mlx_safe_metalsim/__init__.py",
        "mlx_safe_metalsim/libmetalsim.so",
        "mlx_safe_metalsim/py.typed",
    ]
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=target, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        Path(done.stdout.strip())
        == target / names[names.index("mlx_safe_metalsim/libmetalsim.so")]
    )
