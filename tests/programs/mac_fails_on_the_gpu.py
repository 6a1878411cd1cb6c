"""Before a server: `work_on_the_gpu` fails a command buffer of the simulated GPU."""

import os
import sys  # noqa: F401
import threading  # noqa: F401

import machpy
import mlx.core as mx


def work_on_the_gpu():
    with mx.stream(mx.gpu):
        mx.eval(mx.exp(mx.array([1.0])))
        machpy.fail(1)
        try:
            mx.eval(mx.exp(mx.array([1.0])))
            mx.synchronize()
        except RuntimeError as e:
            os.write(1, f"metal: {e}\n".encode())
