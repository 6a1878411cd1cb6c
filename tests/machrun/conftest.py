"""Everything is fetched and built before: `make machrun`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .setup.packages import get_model
from .setup.places import LOADER


def pytest_configure() -> None:
    seed = os.environ.get("MACHRUN_SEED", "9")
    if not seed.isdecimal():
        pytest.exit(f"MACHRUN_SEED={seed} is no number", returncode=2)


def pytest_collection_modifyitems() -> None:
    if not LOADER.exists():
        pytest.exit("run these with `make machrun`, which sets them up", returncode=2)


@pytest.fixture(scope="session")
def model() -> Path:
    """Directory of the tiny random model."""
    return get_model()
