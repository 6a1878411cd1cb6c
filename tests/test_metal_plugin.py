"""The pytest plugin's simulated Metal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.native import Native
from support.plugin import run
from support.programs import program

ROOT = Path(__file__).parent.parent
pytest_plugins = ["pytester"]


@pytest.fixture
def metalsim_package(native: Native, tmp_path: Path) -> Path:
    """Where the package is, as its wheel has it."""
    sources = ROOT / "packages" / "mlx-safe-metalsim" / "src"
    shutil.copytree(sources, tmp_path / "packages")
    library = tmp_path / "packages" / "mlx_safe_metalsim" / "libmetalsim.so"
    shutil.copy(native.runtime, library)
    return tmp_path / "packages"


def test_the_simulated_metal(
    pytester: pytest.Pytester, metalsim_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join([str(metalsim_package), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    result = run(pytester, program("simulated_metal"))
    result.assert_outcomes(passed=7, errors=1)
    result.stdout.fnmatch_lines(["*command buffer 5 with code 8 never fired*"])
