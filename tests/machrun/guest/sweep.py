"""Faults in every command buffer of an evaluation, under the hooks.

sweep.py WITH_CPU WITHOUT_CPU SECONDS: how many evaluations must fail with the CPU's
stream between the GPU's, and without it; and how long four threads run.

Each evaluation has a fault planned for its first, second … buffer, once or for good,
with each code, with handlers that come late or not. It is run under the guard, which
must raise if a buffer of it has failed, and must not if none has. Prints a JSON
object of what was counted.

From 0.32.1 on MLX counts a task too many now and then when an error of the CPU's stream
surfaces, and waits for ever once it has counted ten (docs/metal.md). There only a short
part goes over the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import threading
import time

import machpy
import mlx.core as mx

import mlx_safe
from mlx_safe import _core

CODES = (2, 3, 5, 8, 9, 0xA, 0xB, 0xE, 0x10, 0x11)  # not 4: it bans the process
FIRST = (1, 2, 3, 4)
THREADS = 4


def evaluate(second: mx.Stream, cpu: bool) -> None:
    """Several buffers on two GPU streams, and the CPU between."""
    x = mx.exp(mx.array([1.0, 2.0]))
    y = mx.add(x, 1, stream=mx.cpu if cpu else mx.gpu)
    z = mx.sin(y, stream=second)
    mx.eval(mx.exp(z), y)


def sweep(count: int, cpu: bool) -> dict[str, int]:
    second = mx.new_stream(mx.gpu)
    found = dict.fromkeys(
        ("evaluations", "faults", "told", "silent", "untrue", "other"), 0
    )
    ways = itertools.cycle(itertools.product(FIRST, CODES, (False, True), (0, 300)))
    for nth, code, persistent, late_us in ways:
        if found["faults"] >= count:
            return found
        found["evaluations"] += 1
        before = machpy.failed_buffers()
        machpy.fail(nth, code, persistent, late_us)
        told = False
        try:
            with mlx_safe.guard():
                evaluate(second, cpu)
        except mlx_safe.MetalError:
            told = True
        except Exception as e:
            found["other"] += 1
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        machpy.simulator("metalsim_plan_clear", None)()
        failed = machpy.failed_buffers() > before
        found["faults"] += failed
        found["told"] += told and failed
        found["silent"] += failed and not told
        found["untrue"] += told and not failed
        settle(second)
    return found


def settle(second: mx.Stream) -> None:
    """Takes what MLX has stored, so that the next evaluation begins with nothing."""
    for stream in (mx.default_stream(mx.gpu), second):
        with contextlib.suppress(RuntimeError):
            mx.synchronize(stream)


def threads(seconds: float, cpu: bool) -> dict[str, int]:
    """Four threads with a stream each, and a fault every 5 ms.

    An evaluation in which a buffer fails must raise. Where two of its buffers fail it
    raises once, so evaluations are counted, by the buffers that their thread commits.
    """
    found = dict.fromkeys(
        ("evaluations", "faults", "told", "silent", "untrue", "other", "planned"), 0
    )
    lock, made = threading.Lock(), threading.Barrier(THREADS + 1)
    stop = threading.Event()

    def work() -> None:
        # In the thread that uses it, since from 0.31 on no other may. And one after the
        # other: 0.30.6 keeps streams and their queues without a lock, and 5 of 100
        # processes crashed where four threads made theirs at once.
        with lock:
            stream = mx.new_stream(mx.gpu)
            # Of its own: 0.30.6 has one for all threads, which tells the failure of
            # one thread's buffer to others.
            last = mx.new_stream(mx.cpu) if cpu else stream
            mx.eval(mx.add(mx.ones((64,), stream=stream), 1, stream=last))
        made.wait()
        while not stop.is_set():
            before = machpy.planned_here()
            told = other = False
            try:
                x = mx.ones((64,), stream=stream)
                for _ in range(20):
                    x = mx.sin(x, stream=stream)
                mx.eval(mx.add(x, 1, stream=last))
            except RuntimeError as e:
                told = "Command buffer execution failed" in str(e)
                other = not told
            failed = machpy.planned_here() - before
            with lock:
                found["evaluations"] += 1
                found["planned"] += failed
                found["faults"] += failed > 0
                found["told"] += told and failed > 0
                found["silent"] += failed > 0 and not told
                found["untrue"] += told and not failed
                found["other"] += other

    workers = [threading.Thread(target=work) for _ in range(THREADS)]
    for worker in workers:
        worker.start()
    made.wait()
    before = machpy.failed_buffers()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        machpy.fail(1, 8)
        time.sleep(0.005)
    # A thread that ends commits a last buffer of its stream, of no evaluation.
    machpy.simulator("metalsim_plan_clear", None)()
    stop.set()
    for worker in workers:
        worker.join()
    found["failed"] = machpy.failed_buffers() - before
    return found


if __name__ == "__main__":
    status = mlx_safe.install()
    mx.eval(mx.exp(mx.array([1.0])))
    result = {
        "mlx": mx.__version__,
        "mode": status.mode,
        "verified": status.verified,
        "hooked": len(status.hooked),
        "reasons": list(status.reasons),
        "over the CPU": sweep(int(sys.argv[1]), True),
        "on the GPU": sweep(int(sys.argv[2]), False),
        "threads": threads(float(sys.argv[3]), status.mode == "intercept"),
    }
    result["counters"] = _core.metal_counters()
    print(json.dumps(result))
