"""Each function leaves something of MLX's unsound behind, or looks as if it did.

`sound_after_a_failure` comes behind this, and calls the one that FAILURE names.
"""

from functools import partial
from typing import Any

import mlx.core as mx

FAILURE: str
kept: dict[str, Any] = {}
raising = True


def tracers_in_the_random_state():
    @partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
    def draw(x):
        mx.random.categorical(x)
        raise LookupError

    draw(mx.zeros((1, 8)))


def tracers_of_a_gradient():
    def loss(x):
        raise LookupError

    mx.grad(loss)(mx.ones((2,)))


def a_compiled_function():
    @mx.compile
    def twice(x):
        if raising:
            raise LookupError
        return x * 2

    kept["twice"] = twice
    twice(mx.ones((2,)))


def a_stream_that_is_left_open():
    def steps():
        with mx.stream(mx.new_stream(mx.default_device())):
            yield 1
            yield 2

    kept["steps"] = steps()
    next(kept["steps"])
    raise LookupError


def streams_that_are_left_open_one_in_another():
    def steps():
        with mx.stream(mx.new_stream(mx.default_device())):
            yield 1

    inner_last = [steps() for _ in range(2)]
    for generator in inner_last:
        next(generator)
    # Only the collector finds them, the outer one first.
    for generator in inner_last:
        cycle: list[Any] = [generator]
        cycle.append(cycle)
    del generator, cycle, inner_last
    raise LookupError


def another_device():
    mx.set_default_device(mx.Device(mx.cpu, 0))
    mx.set_default_stream(mx.new_stream(mx.cpu))
    raise LookupError
