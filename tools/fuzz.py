"""Looks for what the fixed examples of CI do not show: `make fuzz`.

    python tools/fuzz.py [--seconds N] [--seed N] [PYTEST-ARGUMENT ...]

Runs every property test again and again, each round with a seed of its own, which
is printed, until the time is over. The first failure ends it, and says how to see
it again.

Exit status: 0, or 1 after a failure.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="begin no round later"
    )
    parser.add_argument("--seed", type=int, help="run the one round with this seed")
    parser.add_argument("rest", nargs="*", help="for pytest, such as -k")
    args, more = parser.parse_known_args()
    if args.seed is not None:
        return run(args.seed, [*args.rest, *more])
    end = time.monotonic() + args.seconds
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        if run(secrets.randbits(32), [*args.rest, *more]) != 0:
            return 1
        rounds += 1
    print(f"{rounds} rounds, no failure")
    return 0


def run(seed: int, arguments: list[str]) -> int:
    """One round; the status of pytest."""
    print(f"seed {seed}", flush=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--quiet"]
    command += ["-m", "hypothesis", f"--hypothesis-seed={seed}", *arguments]
    environment = {**os.environ, "MLX_SAFE_TEST_PROFILE": "fuzz"}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status != 0:
        which = f" ARGS={shlex.quote(shlex.join(arguments))}" if arguments else ""
        print(f"to see it again: make fuzz SEED={seed}{which}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
