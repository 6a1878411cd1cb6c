"""What only a Mac can show; everything here is marked requires_metal."""

from __future__ import annotations

from pathlib import Path

import pytest


# Before tests/conftest.py looks for the mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.requires_metal)
