"""tests/hardware, run before a Mac runs it: on the simulated Metal, as if on a Mac."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from .runner import LIMIT_S, Machine
from .setup.packages import PAIRS
from .setup.places import HERE, ROOT

HARDWARE = ROOT / "tests" / "hardware"
# Of the simulated GPU; what is live beyond it makes a command buffer fail.
MEMORY = 64 << 20
NOT_RUN = {
    "test_what_is_computed_after_it_is_right": (
        "the simulated GPU computes nothing: only a Mac can show a right number"
    ),
}


def names() -> list[str]:
    """The functions in tests/hardware that are tests."""
    return [
        part.name
        for file in sorted(HARDWARE.glob("test_*.py"))
        for part in ast.parse(file.read_text()).body
        if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")
    ]


@pytest.fixture(scope="module", params=PAIRS)
def said(request: pytest.FixtureRequest, model: Path) -> str:
    """What pytest says of all of them, in the guest."""
    machine = Machine(mlx=request.param, server=True)
    left_out = " and ".join(f"not {name}" for name in NOT_RUN)
    options = ["-p", "no:cacheprovider", "-v", "-k", left_out]
    done = subprocess.run(
        [HERE / "python", "-m", "pytest", *options, HARDWARE],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        cwd=ROOT,
        env={
            **os.environ,
            **machine.environment,
            "MACHRUN_MEMORY": str(MEMORY),
            "MLX_SAFE_TEST_HARDWARE": "1",
            "MLX_SAFE_TEST_TINY_MODEL": str(model),
        },
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", names())
def test_it_passes_on_the_simulated_metal(name: str, said: str) -> None:
    if reason := NOT_RUN.get(name):
        pytest.skip(reason)
    assert re.search(rf"::{name} PASSED", said), said[-6000:]


def test_what_is_not_run_is_there() -> None:
    assert set(NOT_RUN) <= set(names())
