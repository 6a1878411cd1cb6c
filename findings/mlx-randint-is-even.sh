#!/usr/bin/env bash
# Large numbers of mx.random.randint are even, and from a trillion on multiples of 4,096.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.random.randint.
# Guess before: "uniformly distributed integers" between low and high: each can come, half of
# them are odd.
# Seen: they are made as float32 and cut, and a float32 has 24 bits. Of numbers below 2^24
# half are odd, below 2^27 some 6%, below 2^31 0.4%, below 2^40 in int64 none of 50,000, and nearly
# all of those are multiples of 4,096. Dozens of the 50,000 are drawn twice, where of 2^40
# numbers one would meet none. Nothing is said.
# Seeds and ids of it repeat far too early, and `% n` of it is 0 for each power of two up to a
# size. Draw such numbers with NumPy or Python, or put them together of 16 bits each.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

print("mlx", version("mlx"))
mx.random.seed(0)
N = 50_000
for bits, low, high in ((24, 0.45, 0.55), (27, 0.03, 0.09), (31, 0.0, 0.01), (40, 0.0, 0.0)):
    drawn = mx.random.randint(0, 2**bits, (N,), mx.int64).tolist()
    odd = sum(n % 2 for n in drawn) / N
    coarse = sum(n % 2**12 == 0 for n in drawn) / N
    print(f"below 2^{bits}: {odd:.2%} are odd, {coarse:.1%} multiples of 4,096,"
          f" {N - len(set(drawn))} of {N} came before")
    assert max(drawn) > 0.99 * 2**bits
    assert low <= odd <= high
assert coarse > 0.95
assert N - len(set(drawn)) > 10
PYTHON
done
echo "as written: few large numbers are odd"
