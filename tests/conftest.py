"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny random model; made in a child, which uses MLX."""
    directory = tmp_path_factory.mktemp("tiny-model")
    subprocess.run(
        [sys.executable, str(ROOT / "support" / "tiny_model.py"), str(directory)],
        check=True,
        timeout=120,
    )
    return directory


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Directory of SmolLM2-135M-Instruct; `make test` prepares it."""
    path = os.environ.get("MLX_SAFE_TEST_MODEL")
    if not path:
        pytest.fail("set MLX_SAFE_TEST_MODEL, or run the suite with `make test`")
    return Path(path)


@pytest.fixture(autouse=True)
def private_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's own report directory."""
    directory = tmp_path / "reports"
    monkeypatch.setenv("MLX_SAFE_REPORT_DIR", str(directory))
    return directory
