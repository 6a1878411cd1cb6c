"""Calls what FAILURE names, which fails: MLX's state is sound after it.

`fails_in_six_ways` stands before this, in one program.
"""

import gc
import threading
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_safe._thread_state import ThreadState

FAILURE: str
kept: dict[str, Any] = {}
raising = True


def work():
    global raising
    state = ThreadState()
    device, stream = mx.default_device(), mx.default_stream(mx.default_device())
    try:
        globals()[FAILURE]()  # noqa: F821
    except LookupError:
        pass
    else:
        raise AssertionError("it did not fail")
    state.restore()
    gc.collect()  # whenever the collector comes by
    state.hold()
    assert mx.default_device() == device
    assert mx.default_stream(device) == stream
    raising = False
    if "twice" in kept:
        assert kept["twice"](mx.ones((2,))).tolist() == [2, 2]
    draw = partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
    drawn = draw(lambda x: mx.random.categorical(x))
    tokens = {drawn(mx.zeros((1, 1000))).item() for _ in range(8)}
    assert len(tokens) > 1, tokens
    assert mx.random.uniform(shape=(3,)).shape == (3,)
    gradient = mx.grad(lambda x: (x * x).sum())(mx.array([3.0]))
    assert gradient.tolist() == [6.0]
    kept.pop("steps", None)  # its block ends only now
    assert (mx.ones((4,)) + 1).sum().item() == 8
    print("sound")


thread = threading.Thread(target=work)
thread.start()
thread.join()
