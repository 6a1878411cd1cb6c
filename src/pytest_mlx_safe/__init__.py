"""The pytest plugin of mlx-safe: faults of the GPU as fixtures.

pytest imports this in every run of an environment that has mlx-safe. Nothing else is
imported, and nothing changed, unless a test uses one of the fixtures. docs/testing.md
has examples.

| Fixture | What it does |
|---|---|
| `metal_fault` | plans a fault by code and place, here or in a program |
| `out_of_memory_after` | so many generation steps go well, then memory is out |
| `gpu_ceiling` | a GPU of a chosen size |
| `simulated_metal` | the simulated Metal, whose command buffers fail |

A fault that was planned and never struck is an error of the test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from ._faults import Ceilings, Faults, OutOfMemoryAfter
    from ._metal import Metal

FIXTURES = {"metal_fault", "out_of_memory_after", "gpu_ceiling", "simulated_metal"}
_has_passed = pytest.StashKey[bool]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Models that the tests load are counted, whichever fixture loads them first."""
    if any(map(_uses_us, session.items)):
        from mlx_safe import testing

        testing.attach_all()


def _uses_us(item: pytest.Item) -> bool:
    return not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_has_passed] = report.passed
    return report


def _tell(request: pytest.FixtureRequest, unfired: list[str]) -> None:
    """What a test has failed for itself is not added to."""
    if unfired and request.node.stash.get(_has_passed, False):
        pytest.fail("\n".join(unfired), pytrace=False)


@pytest.fixture
def metal_fault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Faults]:
    """Plans faults: ``metal_fault("decode", step=3, code=8)``.

    Takes what `mlx_safe.testing.inject` takes, and returns its `Injection`. The calls
    of each model that is loaded during the run are counted; of another model after
    ``metal_fault.attach(model)``. For a program that the test starts:
    ``env=metal_fault.environment("decode:3:8")``.
    """
    from ._faults import Faults

    faults = Faults(tmp_path)
    yield faults
    _tell(request, faults.end())


@pytest.fixture
def out_of_memory_after(metal_fault: Faults) -> OutOfMemoryAfter:
    """``out_of_memory_after(n)``: after ``n`` generation steps the next one fails.

    With ``persistent=True`` each one that follows as well. Returns the `Injection`.
    """
    from ._faults import OutOfMemoryAfter

    return OutOfMemoryAfter(metal_fault)


@pytest.fixture
def gpu_ceiling(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ceilings]:
    """``gpu_ceiling("2G")``: a generation step that needs more memory fails.

    Returns the `mlx_safe.testing.GPUCeiling`. That none fails is no error, but that
    none was measured is. For a program: ``env=gpu_ceiling.environment("2G")``.
    """
    from ._faults import Ceilings

    ceilings = Ceilings(tmp_path)
    yield ceilings
    _tell(request, ceilings.end())


@pytest.fixture
def simulated_metal(request: pytest.FixtureRequest) -> Iterator[Metal]:
    """Metal, simulated, in this process: mlx_safe's hooks are in it.

    ``simulated_metal.fail(code=8)`` lets the next command buffer fail, which
    `mlx_safe.testing.run_command_buffer` runs. For a program:
    ``env=simulated_metal.environment()``. Needs the package mlx-safe-metalsim.
    """
    from ._metal import Metal

    metal = Metal.start()
    yield metal
    _tell(request, metal.end())
