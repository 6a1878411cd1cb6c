"""What failures leave behind in MLX, and that the reset makes it sound."""

from __future__ import annotations

import weakref

import mlx.core as mx
import pytest

from mlx_safe import _core
from mlx_safe._thread_state import ThreadState, drop_failed
from support.child import run
from support.programs import program

FAILURES = (
    "tracers_in_the_random_state",
    "tracers_of_a_gradient",
    "a_compiled_function",
    "a_stream_that_is_left_open",
    "streams_that_are_left_open_one_in_another",
    "another_device",
)
PROGRAM = program("fails_in_six_ways") + program("sound_after_a_failure")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_thread_is_sound_after(failure: str) -> None:
    assert "sound" in run(f"FAILURE = {failure!r}\n{PROGRAM}").stdout


def test_each_new_seed_is_another() -> None:
    state = ThreadState()
    drawn = set()
    for _ in range(4):
        state.restore()
        drawn.add(mx.random.randint(0, 2**30).item())
    assert len(drawn) == 4


def test_errors_that_are_pending_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = [RuntimeError("one"), RuntimeError("another")]

    def synchronize() -> None:
        if pending:
            raise pending.pop()

    state = ThreadState()
    monkeypatch.setattr(mx, "synchronize", synchronize)
    state.restore()
    assert pending == []


class Held:
    """Stands for an array of the work that has failed."""


def test_what_failed_is_freed_when_nothing_writes_to_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX 0.32 raises a stored error without a wait."""
    seen: list[weakref.ref[Held]] = []

    def step() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise RuntimeError

    there_at_the_wait = []
    monkeypatch.setattr(
        _core,
        "metal_wait_for_skipped",
        lambda: there_at_the_wait.append(seen[0]() is not None),
    )
    try:
        step()
    except RuntimeError as e:
        drop_failed(e)
    assert there_at_the_wait == [True]
    assert seen[0]() is None
