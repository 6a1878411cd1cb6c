"""Time to import mlx_safe on top of mlx.core, in fresh interpreters.

Aim: under 10 ms. Prints the median, the spread and the ratio to importing
mlx.core itself, all of one run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROBE = """
import time
t = time.perf_counter()
import mlx.core
u = time.perf_counter()
import mlx_safe
v = time.perf_counter()
print((u - t) * 1e3, (v - u) * 1e3)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    rows = []
    for i in range(runs + 1):
        out = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
        ).stdout
        if i:  # the first run reads the files from disk
            rows.append(tuple(float(x) for x in out.split()))
    mlx, ours = ([row[i] for row in rows] for i in (0, 1))
    print(f"import, {runs} fresh interpreters, median (min to max) in ms")
    for name, values in (("mlx.core", mlx), ("mlx_safe after it", ours)):
        median = statistics.median(values)
        print(f"  {name:18} {median:6.2f}  ({min(values):.2f} to {max(values):.2f})")
    ratio = statistics.median(o / m for m, o in rows)
    print(f"  ratio              {ratio:6.2f}")


if __name__ == "__main__":
    main()
