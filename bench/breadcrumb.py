"""What recording costs from Python, and how long a report takes to write.

Each figure stands next to one of the same run: an empty function, a file of the same
size, the death of a process without a report.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

directory = tempfile.TemporaryDirectory()
os.environ["MLX_SAFE_REPORT_DIR"] = directory.name

import mlx_safe  # noqa: E402
from mlx_safe import _core, _reports  # noqa: E402

CALLS = 2_000
RUNS = 200
REPORTS = 40


def nothing(text: str, /, **fields: object) -> None:
    """What any call with these arguments costs."""


def best_ns(call: str, **names: object) -> float:
    runs = timeit.repeat(call, number=CALLS, repeat=RUNS, globals=names)
    return min(runs) / CALLS * 1e9


def median_ms(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPORTS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3


def die() -> None:
    pid = os.fork()
    if pid == 0:
        os.abort()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGABRT


def main() -> None:
    print(f"recording, best of {RUNS} runs of {CALLS} calls")
    for arguments in (
        '"a text of the usual length"',
        '"prefill", done=512, total=2048',
    ):
        empty = best_ns(f"f({arguments})", f=nothing)
        ours = best_ns(f"f({arguments})", f=mlx_safe.breadcrumb)
        print(f"  breadcrumb({arguments}) {ours:6.0f} ns  ({ours / empty:.1f} calls)")
    ours = best_ns("f(3, 100, 64, 7)", f=_core.request_progress)
    print(f"  progress of a request {ours:6.0f} ns")

    print(f"writing, median of {REPORTS}")
    living = median_ms(lambda: _reports.write("fault", "bench", 8))
    newest = max(Path(directory.name).glob("[0-9]*.json"))
    size = newest.stat().st_size
    plain = median_ms(lambda: newest.with_suffix(".bin").write_bytes(b"x" * size))
    print(f"  report of a living process, {size} bytes {living:6.2f} ms")
    print(f"  any file of that size {plain:6.2f} ms  (ratio {living / plain:.1f})")
    print(f"  run file {median_ms(_core.write_run_file):6.2f} ms")
    bare = median_ms(die)
    mlx_safe.install(signals=True)
    told = median_ms(die)
    print(f"  death by SIGABRT {bare:6.2f} ms, with a report {told:6.2f} ms")


if __name__ == "__main__":
    main()
