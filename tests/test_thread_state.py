"""What failures leave behind in MLX, and that the reset makes it sound."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_safe._thread_state import ThreadState
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
