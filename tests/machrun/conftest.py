"""Everything is fetched and built before: `make machrun`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .setup.packages import get_model
from .setup.places import LOADER


def pytest_collection_modifyitems() -> None:
    if not LOADER.exists():
        pytest.exit("run these with `make machrun`, which sets them up", returncode=2)


@pytest.fixture(scope="session")
def model() -> Path:
    """Directory of the tiny random model."""
    return get_model()
