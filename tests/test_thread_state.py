"""What failures leave behind in MLX, and that the reset makes it sound."""

from __future__ import annotations

import weakref

import mlx.core as mx
import pytest

from mlx_safe import _core
from mlx_safe._thread_state import ThreadState, drop_failed
from support.child import run
from support.programs import program

# Each leaves something unsound behind, or looks as if it did.
FAILURES = {
    "tracers in the random state": """
@partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
def draw(x):
    mx.random.categorical(x)
    raise LookupError
draw(mx.zeros((1, 8)))
""",
    "tracers of a gradient": """
def loss(x):
    raise LookupError
mx.grad(loss)(mx.ones((2,)))
""",
    "a compiled function": """
raising = True
@mx.compile
def twice(x):
    if raising:
        raise LookupError
    return x * 2
kept["twice"] = twice
twice(mx.ones((2,)))
""",
    "a stream that is left open": """
def steps():
    with mx.stream(mx.new_stream(mx.default_device())):
        yield 1
        yield 2
kept["steps"] = steps()
next(kept["steps"])
raise LookupError
""",
    "streams that are left open, one in another": """
def steps():
    with mx.stream(mx.new_stream(mx.default_device())):
        yield 1
inner_last = [steps() for _ in range(2)]
for generator in inner_last:
    next(generator)
# Only the collector finds them, the outer one first.
for generator in inner_last:
    cycle = [generator]
    cycle.append(cycle)
del generator, cycle, inner_last
raise LookupError
""",
    "another device": """
mx.set_default_device(mx.Device(mx.cpu, 0))
mx.set_default_stream(mx.new_stream(mx.cpu))
raise LookupError
""",
}

PROGRAM = program("sound_after_a_failure")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_thread_is_sound_after(failure: str) -> None:
    program = f"FAILURE = {FAILURES[failure]!r}\n{PROGRAM}"
    assert "sound" in run(program).stdout


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
