"""What only hardware can show: marked requires_cuda in test_cuda.py, else _metal."""

from __future__ import annotations

from pathlib import Path

import pytest


# Before tests/conftest.py looks for the mark.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            cuda = item.path.name == "test_cuda.py"
            mark = pytest.mark.requires_cuda if cuda else pytest.mark.requires_metal
            item.add_marker(mark)
