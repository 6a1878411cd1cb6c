"""The fixtures, as authors of other servers use them: in a pytest of their own."""

from __future__ import annotations

import os

import pytest

from support.plugin import run

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MLX_SAFE_INJECT"):
            monkeypatch.delenv(name)


def test_each_fixture_in_this_process(pytester: pytest.Pytester) -> None:
    run(
        pytester,
        """
def test_by_code_and_place(metal_fault, model):
    plan = metal_fault("decode", step=2, code=0xe)
    model(PROMPT)
    model(inputs=TOKEN)
    with pytest.raises(RuntimeError, match="Impacting Interactivity"):
        model(None, input_embeddings=mx.zeros((1, 1, 8)))
    assert plan.fired == 1
    model(TOKEN)

def test_the_last_plan_is_gone(metal_fault, model):
    model(TOKEN)

def test_out_of_memory(out_of_memory_after, model):
    out_of_memory_after(2, persistent=True)
    model(PROMPT)
    model(TOKEN)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            model(TOKEN)

def test_a_small_gpu(gpu_ceiling, model):
    small = gpu_ceiling("1k")
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        model(mx.zeros((64, 64), mx.int32))
    assert (small.steps, small.struck) == (1, 1)

def test_a_large_one_is_no_error(gpu_ceiling, model):
    assert gpu_ceiling("2G").size == 2 * 10**9
    model(TOKEN)

def test_a_model_that_is_not_loaded(metal_fault):
    plain = metal_fault.attach(Model())
    metal_fault("prefill")
    with pytest.raises(RuntimeError):
        plain(PROMPT)
""",
    ).assert_outcomes(passed=6)


def test_a_plan_that_never_fired_is_an_error(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def test_too_late(metal_fault, model):
    metal_fault("decode", step=2)
    model(TOKEN)

def test_nothing_is_measured(gpu_ceiling):
    gpu_ceiling("2G")

def test_program(metal_fault):
    run(metal_fault.environment("decode:9:2, prefill:1"))

def test_its_own_failure_is_what_is_told(metal_fault):
    metal_fault("decode")
    assert False, "first"

def test_skipped(metal_fault):
    metal_fault("decode")
    pytest.skip("something is missing")
""",
    )
    result.assert_outcomes(passed=3, failed=1, errors=3, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "*decode:2:8:once:raise never fired: 1 decode steps were counted*",
            "*a ceiling of 2.0 GB: no generation step was measured*",
            "*MLX_SAFE_INJECT=decode:9:2, prefill:1: decode:9:2:once:raise never "
            "fired in the program, which has loaded Model*",
        ]
    )


def test_programs(pytester: pytest.Pytester) -> None:
    """They import nothing of mlx-safe: the environment has the plan."""
    run(
        pytester,
        """
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
""",
    ).assert_outcomes(passed=5)


def test_who_uses_no_fixture_is_left_alone(pytester: pytest.Pytester) -> None:
    """Not even mlx_safe is imported."""
    result = run(
        pytester,
        """
def test_nothing_is_ours(model):
    assert type(model) is Model
    assert "mlx_safe" not in sys.modules
""",
    )
    result.assert_outcomes(passed=1)
    result = pytester.runpytest_subprocess("--fixtures")
    for name in ("metal_fault", "out_of_memory_after", "gpu_ceiling"):
        result.stdout.fnmatch_lines([f"{name} *"])


def test_without_its_package_it_says_what_to_install(
    pytester: pytest.Pytester,
) -> None:
    result = run(pytester, "def test_it(simulated_metal): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*pip install mlx-safe-metalsim*"])
