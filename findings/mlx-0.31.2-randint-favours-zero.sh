#!/usr/bin/env bash
# mx.random.randint(-1, 2) of mlx 0.31.2 gives 0 in two of three draws, and never -1.
#
# Package: mlx 0.31.2 and 0.32.4 (CPU), mx.random.randint with a negative `low`.
# Guess before: "drawn from [low, high)": each of -1, 0 and 1 in a third of the draws.
# Seen: 0.32.4 is right. 0.31.2 cuts a float towards zero: what lies between -1 and 1 is 0. So
# `low` never comes and 0 comes twice as often as any other. Of (-1, 2) it is 0 in 67% and 1 in
# 33%, of (-5, 5) 0 in 20%. Of int8's whole range -128 never comes.
# Random shifts, jitter and moves that are drawn so drift upwards.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from collections import Counter
from importlib.metadata import version

import mlx.core as mx

old = version("mlx") == "0.31.2"
mx.random.seed(0)
N = 100_000
for low, high in ((-1, 2), (-5, 5)):
    drawn = Counter(mx.random.randint(low, high, (N,)).tolist())
    shares = {n: round(drawn[n] / N, 2) for n in range(low, high)}
    print(version("mlx"), (low, high), shares)
    even = 1 / (high - low)
    for n, share in shares.items():
        expected = even
        if old:
            expected = {low: 0, 0: 2 * even}.get(n, even)
        assert abs(share - expected) < 0.011, (n, share, expected)
bytes_ = mx.random.randint(-128, 128, (N,), mx.int8)
print(version("mlx"), "least of int8:", bytes_.min().item())
assert bytes_.min().item() == (-127 if old else -128)
PYTHON
done
echo "as written: 0.31.2 favours 0"
