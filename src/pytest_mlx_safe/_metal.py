"""Behind the fixture ``simulated_metal``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import pytest

import mlx_safe

PACKAGE = "mlx_safe_metalsim"


class Metal:
    """The simulated Metal in this process, hooked."""

    def __init__(self, package: Any) -> None:
        self._package = package
        self._metal = package.load()
        self._planned: list[str] = []
        self._unfired: list[str] = []
        self._failed = 0

    @classmethod
    def start(cls) -> Metal:
        """Loads it and installs the hooks; fails where that cannot be."""
        if sys.platform != "linux":
            pytest.skip("the simulated Metal is built for Linux")
        try:
            package = importlib.import_module(PACKAGE)
        except ImportError:
            pytest.fail(
                f"simulated_metal needs: pip install {PACKAGE.replace('_', '-')}",
                pytrace=False,
            )
        made = cls(package)
        made._metal.reset()
        os.environ.update(package.environment({}))
        if not mlx_safe.status().verified:
            mlx_safe.uninstall()
            mlx_safe.install()
        if not mlx_safe.status().verified:
            why = "; ".join(mlx_safe.status().reasons)
            pytest.fail(f"simulated_metal: {why}", pytrace=False)
        return made

    @property
    def path(self) -> str:
        """The library's."""
        return str(self._metal.path)

    @property
    def totals(self) -> dict[str, int]:
        """Counts of this test: ``buffers_failed``, ``buffers_committed`` and others."""
        found: dict[str, int] = self._metal.totals
        return found

    def fail(
        self, nth: int = 1, code: int = 8, *, persistent: bool = False, late_us: int = 0
    ) -> None:
        """Lets the ``nth`` command buffer from now fail; instead of what was planned.

        See `mlx_safe_metalsim.SimulatedMetal.fail`.
        """
        self._settle()
        self._metal.fail(nth, code, persistent=persistent, late_us=late_us)
        self._planned.append(f"the failure of command buffer {nth} with code {code}")

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of a program that runs on it: ``base``, or this process's, and its path."""
        made: dict[str, str] = self._package.environment(base)
        return made

    def _settle(self) -> None:
        """The last plan has struck, or never will."""
        failed = self.totals["buffers_failed"]
        if self._planned and failed == self._failed:
            self._unfired.append(f"{self._planned[-1]} never fired")
        self._planned.clear()
        self._failed = failed

    def end(self) -> list[str]:
        """Puts the library back; a line for each failure that has not struck."""
        self._settle()
        self._metal.reset()
        del os.environ["MLX_SAFE_METAL_RUNTIME"]
        return self._unfired
