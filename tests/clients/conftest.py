"""What the tests of the clients share: the stage, and what is missing on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import Stage
from stage import CLIENTS, drivers

# Of the clients and proxies, what is missing is left out, and named; or, if this is
# set, makes the tests fail.
REQUIRED = "1" in (os.environ.get("MLX_SAFE_REQUIRE_CLIENTS"), "CI" in os.environ)


@pytest.fixture(scope="session")
def stage(
    tiny_model: Path, scripted_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with drivers([c for c in CLIENTS if not c.missing()]) as found:
        stage = Stage(tiny_model, scripted_model, tmp_path_factory.mktemp("s"), found)
        try:
            yield stage
        finally:
            stage.stop()
