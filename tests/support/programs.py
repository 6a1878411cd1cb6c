"""Programs that run in children of the tests: tests/programs."""

from __future__ import annotations

import os
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "programs"


def program(name: str) -> str:
    """The text of ``tests/programs/NAME.py``, for ``python -c``."""
    return (PROGRAMS / f"{name}.py").read_text()


def with_suite() -> str:
    """The PYTHONPATH of a program that imports the suite's own modules."""
    path = [str(PROGRAMS.parent), os.environ.get("PYTHONPATH")]
    return os.pathsep.join(filter(None, path))
