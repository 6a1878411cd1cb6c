"""Everything is fetched and built before: `make machrun`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .setup.places import LOADER, ROOT

# Makes the model: any Python with MLX and mlx-lm for this machine.
PYTHON = ROOT / ".venvs" / "observe" / "bin" / "python"


def pytest_collection_modifyitems() -> None:
    if not LOADER.exists():
        pytest.exit("run these with `make machrun`, which sets them up", returncode=2)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny random model."""
    directory = tmp_path_factory.mktemp("model")
    program = ROOT / "tests" / "support" / "tiny_model.py"
    subprocess.run([PYTHON, program, directory], check=True, timeout=300)
    return directory
