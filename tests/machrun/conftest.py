"""Everything is fetched and built before: `make machrun`."""

from __future__ import annotations

import pytest

from .setup.places import LOADER


def pytest_collection_modifyitems() -> None:
    if not LOADER.exists():
        pytest.exit("run these with `make machrun`, which sets them up", returncode=2)
