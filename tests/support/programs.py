"""Programs that run in children of the tests: tests/programs."""

from __future__ import annotations

from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "programs"


def program(name: str) -> str:
    """The text of ``tests/programs/NAME.py``, for ``python -c``."""
    return (PROGRAMS / f"{name}.py").read_text()
