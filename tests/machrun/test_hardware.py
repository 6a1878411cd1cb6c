"""tests/hardware, run before a Mac runs it: on the simulated Metal, as if on a Mac."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from support.versions import NEWEST_PAIR, PAIRS

from .runner import LIMIT_S, Machine
from .setup.places import ALL, HERE, ROOT

HARDWARE = ROOT / "tests" / "hardware"
# Of the simulated GPU; what is live beyond it makes a command buffer fail.
MEMORY = 1 << 30
NOT_RUN = {
    "test_what_is_computed_after_it_is_right": (
        "the simulated GPU computes nothing: only a Mac can show a right number"
    ),
}
# Of a server, whose answers must be a model's: from a GPU that computes nothing come
# tokens that no model has, and a 500. So it computes on the CPU's stream, and the GPU
# is filled beside it. It takes half a minute.
SERVER = "test_a_server_answers_503_and_then_200"


def not_run(version: str) -> dict[str, str]:
    """Why, by name."""
    if ALL or version == NEWEST_PAIR[0]:
        return NOT_RUN
    return {**NOT_RUN, SERVER: "it takes long: MACHRUN_ALL=1 runs it with this pair"}


def names() -> list[str]:
    """The functions in tests/hardware that are tests."""
    return [
        part.name
        for file in sorted(HARDWARE.glob("test_*.py"))
        if file.name != "test_cuda.py"
        for part in ast.parse(file.read_text()).body
        if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")
    ]


@pytest.fixture(scope="module", params=PAIRS)
def version(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def said_in_guest(version: str, model: Path, which: str, **more: str) -> str:
    """What pytest says of those that ``which`` selects."""
    machine = Machine(mlx=version, server=True)
    options = ["-p", "no:cacheprovider", "-v", "-k", which]
    done = subprocess.run(
        [HERE / "python", "-m", "pytest", *options, HARDWARE],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        cwd=ROOT,
        env={
            **os.environ,
            **machine.environment,
            "MACHRUN_MEMORY": str(MEMORY),
            "MLX_SAFE_TEST_HARDWARE": "1",
            "MLX_SAFE_TEST_TINY_MODEL": str(model),
            "MLX_SAFE_TEST_START_S": "560",
            **more,
        },
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def said(version: str, model: Path) -> str:
    """Of all of them, in the guest."""
    which = " and ".join(f"not {name}" for name in {**NOT_RUN, SERVER: ""})
    found = said_in_guest(version, model, which)
    if SERVER not in not_run(version):
        found += said_in_guest(version, model, SERVER, MACHRUN_DEVICE="cpu")
    return found


@pytest.mark.parametrize("name", names())
def test_it_passes_on_the_simulated_metal(name: str, version: str, said: str) -> None:
    if reason := not_run(version).get(name):
        pytest.skip(f"{name}, mlx {version}: {reason}")
    assert re.search(rf"::{name} PASSED", said), said[-6000:]


def test_what_is_not_run_is_there() -> None:
    assert {*NOT_RUN, SERVER} <= set(names())
