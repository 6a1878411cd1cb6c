"""The wheels and the sdist that `make check-wheels` has put into dist/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def built(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if not found and any((ROOT / "dist").glob("*.whl")):
        # `make check-wheels WHEELS=available` has said which Python is missing.
        pytest.skip(f"dist/{pattern} was left out: a Python is not installed here")
    assert len(found) == 1, f"dist/{pattern}: {found}; run `make check-wheels`"
    return found[0]


@pytest.fixture(scope="session")
def sdist() -> Path:
    return built("*.tar.gz")


@pytest.fixture(scope="session")
def macos_wheel() -> Path:
    return built("*-cp312-abi3-macosx_14_0_arm64.whl")


@pytest.fixture(scope="session")
def linux_wheel() -> Path:
    return built("*-cp312-abi3-manylinux_2_35_aarch64.whl")
