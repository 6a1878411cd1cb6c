"""The fixtures, as authors of other servers use them: in a pytest of their own."""

from __future__ import annotations

import os

import pytest

from support.plugin import run
from support.programs import program

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MLX_SAFE_INJECT"):
            monkeypatch.delenv(name)


def test_each_fixture_in_this_process(pytester: pytest.Pytester) -> None:
    run(
        pytester,
        program("plugin_each_fixture"),
    ).assert_outcomes(passed=6)


def test_a_plan_that_never_fired_is_an_error(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        program("plugin_plans_that_never_fired"),
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
        program("plugin_programs"),
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
