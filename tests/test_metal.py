"""The hooks against the simulated Metal, in child processes.

`make test` builds the native programs and names their directory in
MLX_SAFE_TEST_NATIVE. What the simulation models, and what not, is in
tests/metalsim/README.md; nothing here has run on a Mac.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import child
from support.native import Native, in_python, run_on_metal

WORKLOADS = (
    "basic",
    "midgraph",
    "two_queues",
    "gpu_cpu_gpu",
    "fences",
    "sync",
    "decode",
    "tls",
    "held_up",
)
CODES = (0x2, 0x3, 0x4, 0x5, 0x6, 0x8, 0x9, 0xA, 0xB, 0xE, 0x10, 0x11, 0x7)


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout.strip(), done.stderr
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


# ---- the failure without us --------------------


def test_without_hooks_mlx_0_31_dies(native: Native) -> None:
    done = native.host("intercept", "basic", "--fail-nth=3", "--code=8", hooks=False)
    assert done.returncode == -signal.SIGABRT
    assert "std::runtime_error" in done.stderr
    assert "kIOGPUCommandBufferCallbackErrorOutOfMemory" in done.stderr
    assert report_of(native.host("intercept", "basic", "--fail-nth=3"))["told"] == 1


def test_without_hooks_mlx_0_32_tells_the_wrong_one_or_nobody(native: Native) -> None:
    """Why the hooks stay on the newer MLX: some failures reach nobody in time."""
    fault = ("--fail-nth=2", "--code=8", "--rounds=3")
    # The handlers of the first round run when it has been judged.
    bare = report_of(
        native.host("observe", "midgraph", *fault, "--hold-first", hooks=False)
    )
    assert bare["silent_garbage"] > 0
    assert bare["told"] == 1  # the second round, which was none of it
    hooked = report_of(native.host("observe", "midgraph", *fault, "--late-us=3000"))
    assert hooked["silent_garbage"] == 0
    assert hooked["told"] == 1


def test_without_hooks_mlx_0_32_1_hangs(native: Native) -> None:
    """It waits for the CPU stream before it commits what that waits for."""

    def run(version: str) -> int:
        # The first round of the workload, and its first command buffer.
        arguments = ["--rounds=1", "--fail-nth=1", "--time-limit=5"]
        command = ["metalsim/host_observe", "--workload=held_up", *arguments]
        return native.run(*command, f"--mlx={version}").returncode

    hung = 3
    # Unless the failure is found before anything depends on it.
    assert any(run("0.32.1") == hung for _ in range(8))
    assert not any(run("0.32.4") == hung for _ in range(8))


# ---- the sweep --------------------


def problems_of(
    done: subprocess.CompletedProcess[str], persistent: bool, sticky: bool
) -> str | None:
    """What is wrong with a finished run; None when nothing is."""
    if done.returncode != 0:
        return f"exit status {done.returncode}: {done.stderr[-300:]}"
    report = report_of(done)
    wrong = {
        "hang": report["hang"],
        "not idle": not report["idle"],
        "silent garbage": report["silent_garbage"],
        "other exceptions": report["other_exceptions"],
        "handlers out of order": report["handlers_out_of_order"],
        "handlers called twice": report["handlers_called_twice"],
        "handlers not called": report["handlers_registered"]
        - report["handlers_called"],
        "handlers not released": report["handlers_registered"]
        - report["handlers_released"],
        # The report counts failures before the independent work, which the one
        # after the last round strikes.
        "faults not counted": max(0, report["buffers_failed"] - report["epoch"]),
        "faults counted twice": max(0, report["epoch"] - report["buffers_failed"] - 1),
        "methods left replaced": report["modified_methods"],
        # A failure that comes after the last round strikes the independent work.
        "independent work failed": not persistent
        and not sticky
        and report["told"] > 0
        and report["independent_ok"] is not True,
    }
    found = [f"{what}: {value}" for what, value in wrong.items() if value]
    return "; ".join(found) or None


# (code, every one from there on, handlers late by so many microseconds)
Failure = tuple[int, bool, int]


def sweep(
    native: Native,
    regime: str,
    workload: str,
    rounds: int,
    failures_at: Callable[[int], Iterable[Failure]],
    *more: str,
) -> None:
    """Fails the n-th command buffer for n = 1, 2, … until none fails.

    ``failures_at(n)`` says in which ways the n-th is failed, ``more`` is for the host.
    """

    def run(n: int, failure: Failure) -> tuple[bool, str | None]:
        code, persistent, late = failure
        arguments = [f"--fail-nth={n}", f"--code={code}", f"--late-us={late}"]
        arguments += [f"--rounds={rounds}", *(["--persistent"] if persistent else [])]
        arguments += more
        done = native.host(regime, workload, *arguments)
        problem = problems_of(done, persistent, sticky=code == 4)
        failed = done.returncode == 0 and report_of(done)["buffers_failed"] > 0
        line = f"{' '.join(arguments)}: {problem}" if problem else None
        return failed or problem is not None, line

    found: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for n in itertools.count(1):
            results = list(pool.map(functools.partial(run, n), failures_at(n)))
            found += [line for _, line in results if line]
            if not any(failed for failed, _ in results):
                break
            assert n < 200
    assert n > 2
    assert found == []


@pytest.mark.parametrize("regime", ["intercept", "observe"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_sweep(native: Native, workload: str, regime: str) -> None:
    """Out of memory in every way at every step, and one other code."""

    def failures_at(n: int) -> list[Failure]:
        other = CODES[n % len(CODES)]
        return [(8, False, 0), (8, False, 1500), (8, True, 200), (other, False, 300)]

    sweep(native, regime, workload, 6, failures_at)


@pytest.mark.parametrize("workload", ["two_queues", "gpu_cpu_gpu", "fences", "held_up"])
def test_sweep_of_what_hangs_in_mlx_0_32_1(native: Native, workload: str) -> None:
    """MLX 0.32.1 to 0.32.3 wait before they commit: under the hooks that ends.

    Each evaluation raises in time, and no fault is counted but the one there was.
    """
    failures: list[Failure] = [(8, False, 0), (8, False, 1500)]
    # Less than the 10 s after which a wait counts as one that nobody ends.
    limits = ("--mlx=0.32.1", "--time-limit=9")
    sweep(native, "observe", workload, 3, lambda n: failures, *limits)


@pytest.mark.parametrize("regime", ["intercept", "observe"])
@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w != "held_up"])
def test_sweep_of_every_code(native: Native, workload: str, regime: str) -> None:
    """Every code, once and lasting, on time and late, at every step."""
    ways = list(itertools.product(CODES, (False, True), (0, 800)))
    sweep(native, regime, workload, 2, lambda n: ways)


@pytest.mark.parametrize("regime", ["intercept", "observe"])
def test_random_delays(native: Native, regime: str) -> None:
    """Two GPU streams and the CPU with random delays, from many seeds."""

    def run(seed: int) -> str | None:
        workload = WORKLOADS[seed % len(WORKLOADS)]
        arguments = [f"--seed={seed}", f"--fail-nth={1 + seed % 17}", "--code=8"]
        problem = problems_of(native.host(regime, workload, *arguments), False, False)
        return f"{workload} {' '.join(arguments)}: {problem}" if problem else None

    with ThreadPoolExecutor(2) as pool:
        found = [line for line in pool.map(run, range(1, 121)) if line]
    assert found == []


# ---- bad surroundings --------------------


def cases_of(program: str) -> list[tuple[str, str]]:
    """Every case of the program's table with every regime that it runs in."""
    source = Path(__file__).parent / "native" / f"{program}.cpp"
    table = source.read_text().split("kCases = {")[1].split("};")[0]
    regimes = {
        "kBoth": ("intercept", "observe"),
        "kIntercept": ("intercept",),
        "kObserve": ("observe",),
    }
    found = re.findall(r'\{"(\w+)",\s*\{\w+, (\w+)\}\}', table)
    assert len(found) == table.count('"') // 2
    return [(case, regime) for case, where in found for regime in regimes[where]]


@pytest.mark.parametrize("case, regime", cases_of("surroundings"))
def test_surroundings(native: Native, case: str, regime: str) -> None:
    done = native.run("surroundings", case, native.hooks, native.twin, regime)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case, regime", cases_of("after_failure"))
def test_after_a_failure(native: Native, case: str, regime: str) -> None:
    """What MLX's own code does around a failed buffer; each hangs, or goes on
    too early, without the rule of the hooks that is named."""
    done = native.run("after_failure", case, native.hooks, regime)
    assert done.returncode == 0, done.stderr


def test_fuzzed_messages(native: Native) -> None:
    done = native.run("fuzz_errors", "1", "4000")  # a seed
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("regime", ["intercept", "observe"])
def test_fuzzed_errors(native: Native, regime: str) -> None:
    """NSErrors without a number, a text or a userInfo, or with odd ones."""
    done = native.run("fuzz_nserror", "1", "3000", regime)
    assert done.returncode == 0, done.stderr


# ---- from Python --------------------


MODES = ("intercept", "observe")


@pytest.mark.parametrize("mode", MODES)
def test_python(native: Native, mode: str) -> None:
    """A fault is an exception, a guard's and a callback's, once, and nobody else's."""
    done = run_on_metal(native, "faults_on_metal", mode)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_python_sees_every_code(native: Native, mode: str) -> None:
    done = run_on_metal(native, "every_code_on_metal", mode)
    assert done.returncode == 0, done.stderr


def test_python_decodes_any_code(native: Native) -> None:
    """Numbers of all sizes through NSError's userInfo."""
    done = run_on_metal(native, "any_code_on_metal")
    assert done.returncode == 0, done.stderr


def test_python_dies_without_the_hooks(native: Native) -> None:
    done = in_python(
        native,
        """
    fail_next()
    testing.run_command_buffer()
    time.sleep(200)
    """,
        MLX_SAFE_AUTOINSTALL="0",
    )
    assert done.returncode == -signal.SIGABRT
    assert "kIOGPUCommandBufferCallbackErrorOutOfMemory" in done.stderr


def test_python_without_a_device_stands_aside(native: Native) -> None:
    done = in_python(
        native,
        """
    assert not status.verified and not status.hooked
    assert "there is no Metal device" in status.reasons[-1], status.reasons
    assert status.terminate_handler
    with mlx_safe.guard():
        pass
    """,
        before="sim.metalsim_set_no_device(1); import warnings; "
        "warnings.simplefilter('ignore')",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_python_without_a_selector_stands_aside(native: Native, mode: str) -> None:
    done = run_on_metal(native, "stands_aside_on_metal", mode)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_python_in_a_forked_child_stands_aside(native: Native, mode: str) -> None:
    """Also when another thread is at `status` or `install` meanwhile."""
    done = run_on_metal(native, "forks_on_metal", mode)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_python_sees_a_class_that_comes_later(native: Native, mode: str) -> None:
    """It is hooked when it is first seen, and `status` names it from then on."""
    done = in_python(
        native,
        f"""
    before = set(mlx_safe.install(mode={mode!r}).hooked)
    sim.metalsim_set_family(1)
    testing.run_command_buffer()
    late = set(mlx_safe.status().hooked) - before
    assert late and all("Family" in name for name in late), late
    assert sim.metalsim_modified_methods() == len(before | late)
    mlx_safe.uninstall()
    assert mlx_safe.status().hooked == () and sim.metalsim_modified_methods() == 0
    """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_python_beside_another_library(native: Native, mode: str) -> None:
    """It replaces one of our methods: faults are seen, and what stays is said."""
    done = run_on_metal(native, "beside_another_library", mode)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "plan, why",
    [
        (("metalsim_plan_fail", "1", "8", "0", "0"), "a trivial command buffer failed"),
        (("metalsim_plan_fail", "1", "4", "0", "0"), "a trivial command buffer failed"),
        (("metalsim_hold_handlers", "1"), "did not complete in 5 s"),
    ],
)
def test_python_a_failed_verification_breaks_nothing(
    native: Native, mode: str, plan: tuple[str, ...], why: str
) -> None:
    """The hooks are taken out, a warning says so, and the next install works."""
    code = "fails_to_verify_on_metal"
    done = run_on_metal(native, code, mode, why, *plan, MLX_SAFE_AUTOINSTALL="0")
    assert done.returncode == 0, done.stderr


def test_python_imports_while_the_device_fails(native: Native) -> None:
    done = in_python(
        native,
        "\n    print(status.reasons[-1])",
        before="sim.metalsim_plan_fail(1, 8, 1, 0); import warnings; "
        "warnings.simplefilter('ignore')",
    )
    assert "a trivial command buffer failed" in done.stdout, done.stderr


def test_python_threads_all_learn_of_their_failures(native: Native) -> None:
    done = run_on_metal(native, "threads_on_metal")
    assert done.returncode == 0, done.stderr


def test_the_ledger_alone(native: Native) -> None:
    """Each rule, and every order of small programs against a model of the GPU."""
    for program in ("ledger_rules", "ledger_model"):
        done = native.run(program)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_runtime_that_is_not_there() -> None:
    done = child.run(
        """
        import mlx_safe
        status = mlx_safe.status()
        assert "/no/such/library.so" in status.reasons[-1], status.reasons
        """,
        MLX_SAFE_METAL_RUNTIME="/no/such/library.so",
    )
    if sys.platform == "darwin":
        pytest.skip("on macOS the runtime is the system's own")
    assert done.returncode == 0, done.stderr
