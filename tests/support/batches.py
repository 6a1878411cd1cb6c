"""Requests of a batch under `mlx_safe.mlx_lm.protect`, and its fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_safe.mlx_lm
from mlx_safe import testing

PROMPTS = [[5, 9, 100, 7, 30, 8], [50, 51, 52], [3] * 40]
LENGTHS = [12, 20, 9]


@pytest.fixture(scope="module", name="model")
def attached_model(tiny_model: Path) -> Any:
    from mlx_lm import load

    return testing.attach(load(str(tiny_model))[0])


@pytest.fixture(name="protected")
def protected_batches() -> Iterator[None]:
    mlx_safe.mlx_lm.protect()
    yield
    mlx_safe.mlx_lm.unprotect()
