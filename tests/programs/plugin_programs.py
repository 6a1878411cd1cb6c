"""Programs that import nothing of mlx-safe: the environment has the plan."""

import pytest
from plugin_model import run


@pytest.mark.parametrize("protected", [True, False])
def test_a_fault(metal_fault, protected):
    done = run(metal_fault.environment("decode:3:2", protected=protected))
    assert done.returncode == 1
    assert "Caused GPU Timeout" in done.stderr


def test_out_of_memory(out_of_memory_after):
    assert "Insufficient Memory" in run(out_of_memory_after.environment(1)).stderr


def test_a_gpu(gpu_ceiling):
    assert "Insufficient Memory" in run(gpu_ceiling.environment("100")).stderr
    assert run(gpu_ceiling.environment("2G")).returncode == 0


def test_a_mistake_is_told_here(metal_fault, gpu_ceiling):
    with pytest.raises(ValueError, match="cannot read 'sometimes'"):
        metal_fault.environment("sometimes")
    with pytest.raises(ValueError, match="must be a size over zero"):
        gpu_ceiling.environment("much")
    with pytest.raises(ValueError, match="phase must be one of"):
        metal_fault("encode")
