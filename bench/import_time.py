"""CPU time to import mlx_safe on top of mlx.core, in fresh interpreters.

Aim: under 10 ms, and at most 0.2 ms more than before a change. Prints medians and
spreads, the ratio to importing mlx.core itself, and with ``--before`` the difference to
another commit's, pair by pair, all of one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from spread import interval

PROBE = """
import time
t = time.process_time()
import mlx.core
u = time.process_time()
import mlx_safe
v = time.process_time()
print((u - t) * 1e3, (v - u) * 1e3)
"""


def milliseconds(before: str | None = None) -> tuple[float, float]:
    """Of mlx.core, and of mlx_safe after it: of the one in ``before``, or ours."""
    env = dict(os.environ)
    if before is not None:
        env["PYTHONPATH"] = before
    out = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    ).stdout
    mlx, ours = map(float, out.split())
    return mlx, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument(
        "--before", metavar="DIR", help="where `pip install --target` put its wheel"
    )
    args = parser.parse_args()
    rows, differences, then = [], [], []
    for i in range(args.runs + 1):
        # Of both in turn, and neither always first.
        first = milliseconds(args.before) if args.before and i % 2 else None
        now = milliseconds()
        old = first or (milliseconds(args.before) if args.before else None)
        if i == 0:  # the first run reads the files from disk
            continue
        rows.append(now)
        if old is not None:
            then.append(old[1])
            differences.append(now[1] - old[1])
    mlx, ours = ([row[i] for row in rows] for i in (0, 1))
    print(f"import, {args.runs} fresh interpreters, median (min to max), ms of CPU")
    shown = [("mlx.core", mlx), ("mlx_safe after it", ours)]
    for name, values in [*shown, *([("before", then)] if then else [])]:
        median = statistics.median(values)
        print(f"  {name:18} {median:6.2f}  ({min(values):.2f} to {max(values):.2f})")
    ratio = statistics.median(o / m for m, o in rows)
    print(f"  ratio              {ratio:6.2f}")
    if differences:
        median, low, high = interval(differences)
        print(f"  more than before   {median:6.2f}  ({low:.2f} to {high:.2f}, 95 %)")


if __name__ == "__main__":
    main()
