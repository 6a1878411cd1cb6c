"""What MLX sends to Metal: sent.py WORKLOAD…

Runs each workload in a process of its own, without hooks, while the simulated Metal
writes down what is sent: without a fault, and with one in the first command buffer.
They are the first rounds of those of tests/metalsim/hosts. Prints a JSON object:
{workload: [text of a trace, with a fault]}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import machpy
import mlx.core as mx

OPERATIONS = int(os.environ["MLX_MAX_OPS_PER_BUFFER"])
# As in the hosts: so slow that everything is waited for.
GPU_DELAY_US = 20_000


def chain(x: mx.array, length: int, stream: object) -> mx.array:
    for _ in range(length):
        x = mx.exp(x, stream=stream)
    return x


def start() -> mx.array:
    return mx.array([1.0, 2.0])


def second_stream() -> mx.Stream:
    """After the first, which MLX makes when it is asked for."""
    mx.default_stream(mx.gpu)
    return mx.new_stream(mx.gpu)


def basic() -> None:
    mx.eval(chain(start(), 3, mx.gpu))


def midgraph() -> None:
    mx.eval(chain(start(), 4 * OPERATIONS, mx.gpu))


def two_queues() -> None:
    second = second_stream()
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
    second = second_stream()
    node = start()
    for _ in range(3):
        on_gpu = chain(node, 2, mx.gpu)
        on_cpu = mx.exp(on_gpu, stream=mx.cpu)
        on_other = mx.add(on_gpu, on_cpu, stream=second)
        node = mx.add(on_other, on_cpu, stream=mx.gpu)
    mx.eval(node)


def sync() -> None:
    second = second_stream()
    one = chain(start(), OPERATIONS + 4, mx.gpu)
    two = chain(start(), 3, second)
    mx.async_eval(one)
    mx.async_eval(two)
    mx.synchronize(mx.default_stream(mx.gpu))
    mx.synchronize(second)
    mx.eval(one)
    mx.eval(two)


WORKLOADS: dict[str, Callable[[], None]] = {
    "basic": basic,
    "midgraph": midgraph,
    "two_queues": two_queues,
    "gpu_cpu_gpu": gpu_cpu_gpu,
    "fences": fences,
    "sync": sync,
}


def work_in_child(work: Callable[[], None], fault: int, path: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    delay = machpy.simulator("metalsim_set_gpu_delay_us", None, ctypes.c_uint32)
    delay(GPU_DELAY_US)
    trace = machpy.simulator("metalsim_trace", ctypes.c_int, ctypes.c_char_p)
    if trace(os.fsencode(path)) == 0:
        machpy.fail(fault)
        with contextlib.suppress(RuntimeError):
            work()
        wait = machpy.simulator("metalsim_wait_idle", ctypes.c_int, ctypes.c_uint64)
        wait(60_000)
        trace(None)
    os._exit(0)


def traced(work: Callable[[], None], fault: int) -> str:
    """Forks: each begins with streams that nothing was encoded for, or dies."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace")
        child = os.fork()
        if child == 0:
            work_in_child(work, fault, path)
        os.waitpid(child, 0)
        return path.read_text()


if __name__ == "__main__":
    works = {name: WORKLOADS[name] for name in sys.argv[1:]}
    print(json.dumps({n: [traced(w, 0), traced(w, 1)] for n, w in works.items()}))
