"""Tests that use the plugin's simulated Metal."""

import pytest
from plugin_model import TOKEN, load, run

import mlx_safe
from mlx_safe import testing


@pytest.fixture(scope="module")
def model():
    return load()


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
