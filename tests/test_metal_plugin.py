"""The pytest plugin's simulated Metal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.native import Native
from support.plugin import run

ROOT = Path(__file__).parent.parent
pytest_plugins = ["pytester"]

SIMULATED = """
from mlx_safe import testing
import mlx_safe

def test_a_buffer(simulated_metal):
    testing.run_command_buffer()
    simulated_metal.fail(code=2)
    before = mlx_safe.epoch()
    with pytest.raises(mlx_safe.MetalError), mlx_safe.guard():
        testing.run_command_buffer()
    assert mlx_safe.epoch() == before + 1
    assert simulated_metal.totals["buffers_failed"] == 1

def test_a_buffer_is_of_the_guards_in_which_it_was_committed(simulated_metal):
    with mlx_safe.guard(name="before"):
        testing.run_command_buffer()
    with pytest.raises(mlx_safe.MetalError) as caught, mlx_safe.guard(name="outer"):
        with mlx_safe.guard(name="beside"):
            testing.run_command_buffer()
        simulated_metal.fail(code=2)
        with mlx_safe.guard(name="inner"):
            testing.run_command_buffer()
    (fault,) = caught.value.faults
    assert fault.buffer > 0
    assert caught.value.tasks == ("outer", "inner")

def test_again(simulated_metal):
    assert simulated_metal.totals["buffers_failed"] == 0
    testing.run_command_buffer()

def test_never(simulated_metal):
    simulated_metal.fail(nth=5)
    testing.run_command_buffer()

def test_a_step(simulated_metal, metal_fault, model):
    metal_fault("decode", code=8, action="metal")
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        model(TOKEN)

@pytest.mark.parametrize("protected", [True, False])
def test_a_program(simulated_metal, metal_fault, protected):
    env = metal_fault.environment(
        "decode:2:8:once:metal", simulated_metal.environment(), protected=protected
    )
    done = run(env)
    assert "Insufficient Memory" in done.stderr
    assert done.returncode == (1 if protected else -6), done.stderr
"""


@pytest.fixture
def metalsim_package(native: Native, tmp_path: Path) -> Path:
    """Where the package is, as its wheel has it."""
    sources = ROOT / "packages" / "mlx-safe-metalsim" / "src"
    shutil.copytree(sources, tmp_path / "packages")
    library = tmp_path / "packages" / "mlx_safe_metalsim" / "libmetalsim.so"
    shutil.copy(native.runtime, library)
    return tmp_path / "packages"


def test_the_simulated_metal(
    pytester: pytest.Pytester, metalsim_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join([str(metalsim_package), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    result = run(pytester, SIMULATED)
    result.assert_outcomes(passed=7, errors=1)
    result.stdout.fnmatch_lines(["*command buffer 5 with code 8 never fired*"])
