"""The hooks on a real device: verified, and a real fault raises."""

from __future__ import annotations

import platform
import signal
import subprocess

import pytest

import mlx_safe
from mlx_safe import _install, _mlx_versions
from support import child, hog
from support.programs import program, with_suite

# Out of memory takes as long as it takes the Mac to give up paging.
LIMIT_S = 300.0

UNPROTECTED = """
import mlx.core as mx
from support.hog import hog
mx.eval(hog())
"""


def test_install_verifies_itself_on_the_device() -> None:
    status = mlx_safe.install()
    assert platform.system() == "Darwin"
    assert status.verified and status.metal_hooks, status.reasons
    assert status.runtime == "/usr/lib/libobjc.A.dylib"
    assert any("commit]" in name for name in status.hooked), status.hooked
    assert status.reasons == ()


def test_ordinary_work_is_no_fault() -> None:
    done = child.run(program("works_as_always"), timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def out_of_memory() -> subprocess.CompletedProcess[str]:
    code, path = program("runs_out_of_memory"), with_suite()
    return child.run(code, timeout=LIMIT_S, PYTHONPATH=path, **hog.ENVIRONMENT)


def test_a_real_out_of_memory_raises_and_the_process_goes_on(
    out_of_memory: subprocess.CompletedProcess[str],
) -> None:
    assert out_of_memory.returncode == 0, out_of_memory.stderr
    assert "raised MetalOutOfMemoryError 8" in out_of_memory.stdout
    assert "after it" in out_of_memory.stdout
    assert "epoch 0" not in out_of_memory.stdout


def test_what_is_computed_after_it_is_right(
    out_of_memory: subprocess.CompletedProcess[str],
) -> None:
    assert "after it 2000.0 epoch" in out_of_memory.stdout, out_of_memory.stderr


def test_without_us_it_kills_the_process_or_raises_as_mlx_says() -> None:
    """The other side: MLX up to 0.31.2 aborts; later ones raise by themselves."""
    done = child.run(
        UNPROTECTED, timeout=LIMIT_S, PYTHONPATH=with_suite(), **hog.ENVIRONMENT
    )
    version = _install.mlx_version()
    assert version is not None
    if _mlx_versions.behaviour_of(version).regime == "intercept":
        assert done.returncode == -signal.SIGABRT, (done.returncode, done.stderr)
    else:
        assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Insufficient Memory" in done.stderr
