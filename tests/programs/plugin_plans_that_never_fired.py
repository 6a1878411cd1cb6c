"""Plans that never fired, one failure of its own, one that is skipped."""

import pytest
from plugin_model import TOKEN, run


def test_too_late(metal_fault, model):
    metal_fault("decode", step=2)
    model(TOKEN)


def test_nothing_is_measured(gpu_ceiling):
    gpu_ceiling("2G")


def test_program(metal_fault):
    run(metal_fault.environment("decode:9:2, prefill:1"))


def test_its_own_failure_is_what_is_told(metal_fault):
    metal_fault("decode")
    pytest.fail("first")


def test_skipped(metal_fault):
    metal_fault("decode")
    pytest.skip("something is missing")
