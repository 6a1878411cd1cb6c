"""What MLX does with a failed command buffer: cases.py HOOKS…

Each case runs in a process of its own, forked before anything of Metal is used, and
ends with a word: see `OUTCOMES`. HOOKS is `plain`, `hooks` or `guard`. Prints one
JSON object: {hooks: {case: outcome}}.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import machpy
import mlx.core as mx

LIMIT_S = int(os.environ.get("MACHRUN_CASE_LIMIT", "30"))
OUTCOMES = {
    "raised": "the evaluation itself raises RuntimeError",
    "late": "it returns, and a later, unrelated one raises",
    "lost": "no exception is raised",
    "dies": "the process ends by SIGABRT: std::terminate",
    "hangs": f"it has not returned after {LIMIT_S} s",
}
LATER = 5  # unrelated evaluations afterwards
AT_ONCE = 3


def start() -> mx.array:
    return mx.array([1.0, 2.0])


def one_stream() -> None:
    mx.eval(mx.exp(start()) * 2)


def to_the_cpu() -> None:
    mx.eval(mx.add(mx.exp(start()), 1, stream=mx.cpu))


def two_queues() -> None:
    second = mx.new_stream(mx.gpu)
    mx.eval(mx.sin(mx.exp(start()), stream=second))


MANY = 60  # operations: more than MLX puts into one command buffer
LATE_US, COMPILES_US = 1_500_000, 3_500_000  # on a machine that is busy, too


def held_up(last: Callable[[mx.array], mx.array] = mx.tan) -> None:
    """The first stream's signal is encoded and not committed; a committed buffer of
    the second waits for it, and the CPU for that, when encoding finds the failure."""
    second = mx.new_stream(mx.gpu)
    x = start()
    for _ in range(MANY):
        x = mx.exp(x)
    middle = after = mx.sin(x, stream=second)
    for _ in range(MANY):
        after = mx.sin(after, stream=second)
    for _ in range(2):
        middle = mx.add(middle, 1, stream=mx.cpu)
    mx.eval(mx.add(last(mx.add(after, x)), middle))


def hold_up() -> None:
    """All kernels but `tan` are compiled; it takes so long that the failure is known
    when it is encoded, and not before."""
    held_up(mx.sin)
    machpy.slow_pipelines(COMPILES_US)


CASES: dict[str, Callable[[], None]] = {
    "one stream": one_stream,
    "GPU, CPU": to_the_cpu,
    "two GPU streams": two_queues,
    "held up": held_up,
}
BEFORE = {"held up": hold_up}
# When the handlers of the failed buffer run: after everything is encoded, but for
# the pipeline that takes long.
LATE = {"held up": LATE_US, "two GPU streams": LATE_US}


def outcome_of(case: str, hooks: str, nth: int, code: int) -> str:
    """Runs in the child."""
    guard: Any = None
    if hooks != "plain":
        import mlx_safe

        status = mlx_safe.install()
        if not status.verified:
            return f"not hooked: {status}"
        guard = mlx_safe.guard if hooks == "guard" else None
    BEFORE.get(case, one_stream)()
    machpy.fail(nth, code, False, LATE.get(case, 0))
    try:
        if guard is None:
            CASES[case]()
        else:
            with guard():
                CASES[case]()
    except RuntimeError as e:
        return "raised" if "Command buffer execution failed" in str(e) else str(e)
    for _ in range(LATER):
        time.sleep(0.01)
        try:
            one_stream()
            mx.synchronize()
        except RuntimeError as e:
            return "late" if "Command buffer execution failed" in str(e) else str(e)
    return "lost"


def start_child(case: str, hooks: str, nth: int, code: int) -> tuple[int, int]:
    """Forks: the child, and the end of a pipe that it says its outcome into."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.alarm(LIMIT_S)  # SIGALRM ends the process
    try:
        said_here = outcome_of(case, hooks, nth, code)
    except BaseException as e:
        said_here = f"{type(e).__name__}: {e}"
    os.write(write, said_here.encode())
    os._exit(0)


def outcome_at_end(status: int, read: int) -> str:
    """Of a child that has ended."""
    said = os.read(read, 4096)
    os.close(read)
    if os.WIFSIGNALED(status):
        ended = os.WTERMSIG(status)
        words = {signal.SIGABRT: "dies", signal.SIGALRM: "hangs"}
        return words.get(ended, f"signal {ended}")
    return said.decode() or f"status {status}"


def run_all(ways: list[str], nth: int, code: int) -> dict[str, dict[str, str]]:
    """`AT_ONCE` at a time; those that wait longest begin."""
    last = sorted(itertools.product(ways, CASES), key=lambda pair: pair[1] in BEFORE)
    found: dict[str, dict[str, str]] = {way: dict.fromkeys(CASES, "") for way in ways}
    running: dict[int, tuple[str, str, int]] = {}
    while last or running:
        while last and len(running) < AT_ONCE:
            way, case = last.pop()
            child, read = start_child(case, way, nth, code)
            running[child] = way, case, read
        child, status = os.wait()
        way, case, read = running.pop(child)
        found[way][case] = outcome_at_end(status, read)
    return found


if __name__ == "__main__":
    nth, code = map(int, os.environ.get("MACHRUN_PLAN", "1 8").split())
    print(json.dumps(run_all(sys.argv[1:], nth, code)))
