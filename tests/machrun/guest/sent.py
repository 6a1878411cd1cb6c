"""What MLX sends to Metal: sent.py.

Runs each workload in a process of its own, without hooks, while the simulated Metal
writes down what is sent. The workloads are those of tests/metalsim/hosts, one round.
Prints a JSON object: {workload: text of the trace}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import machpy

OPERATIONS = 8  # in a command buffer: `small` in host_workloads.h
os.environ["MLX_MAX_OPS_PER_BUFFER"] = str(OPERATIONS)
LARGE = 40  # what a buffer has where it must not be full

import mlx.core as mx  # noqa: E402  (reads the environment)

Work = Callable[[], None]


def chain(x: mx.array, length: int, stream: object) -> mx.array:
    for _ in range(length):
        x = mx.exp(x, stream=stream)
    return x


def start() -> mx.array:
    return mx.array([1.0, 2.0])


def basic() -> None:
    mx.eval(chain(start(), 3, mx.gpu))


def midgraph() -> None:
    mx.eval(chain(start(), 4 * OPERATIONS, mx.gpu))


def midgraph_async() -> None:
    x = chain(start(), 4 * OPERATIONS, mx.gpu)
    mx.async_eval(x)
    mx.eval(x)


def two_queues() -> None:
    second = mx.new_stream(mx.gpu)
    one, two = start(), start()
    for _ in range(4):
        following = mx.add(one, two, stream=mx.gpu)
        two = mx.add(two, one, stream=second)
        one = following
    mx.eval(one, two)


def gpu_cpu_gpu() -> None:
    first = chain(start(), 3, mx.gpu)
    middle = chain(first, 2, mx.cpu)
    mx.eval(mx.add(middle, first, stream=mx.gpu))


def fences() -> None:
    second = mx.new_stream(mx.gpu)
    node = start()
    for _ in range(3):
        on_gpu = chain(node, 2, mx.gpu)
        on_cpu = mx.exp(on_gpu, stream=mx.cpu)
        on_other = mx.add(on_gpu, on_cpu, stream=second)
        node = mx.add(on_other, on_cpu, stream=mx.gpu)
    mx.eval(node)


def sync() -> None:
    second = mx.new_stream(mx.gpu)
    one = chain(start(), OPERATIONS + 4, mx.gpu)
    two = chain(start(), 3, second)
    mx.async_eval(one)
    mx.async_eval(two)
    mx.synchronize(mx.default_stream(mx.gpu))
    mx.synchronize(second)
    mx.eval(one)
    mx.eval(two)


WORKLOADS: dict[str, Work] = {
    "basic": basic,
    "midgraph": midgraph,
    "midgraph, async": midgraph_async,
    "two_queues": two_queues,
    "gpu_cpu_gpu": gpu_cpu_gpu,
    "fences": fences,
    "sync": sync,
}


def traced(work: Work, fault: int) -> str:
    """Forks, since each begins with streams that nothing was encoded for."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace")
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            trace = machpy.simulator("metalsim_trace", ctypes.c_int, ctypes.c_char_p)
            if trace(os.fsencode(path)) == 0:
                machpy.fail(fault)
                work()
                wait = machpy.simulator(
                    "metalsim_wait_idle", ctypes.c_int, ctypes.c_uint64
                )
                wait(60_000)
            os._exit(0)
        os.waitpid(child, 0)
        return path.read_text()


if __name__ == "__main__":
    faults = [int(word) for word in sys.argv[1:]] or [0]
    print(json.dumps({n: {f: traced(w, f) for f in faults} for n, w in WORKLOADS.items()}))
