#!/usr/bin/env bash
# mx.cumsum counts in the type of what it adds up; mx.sum counts in 32 bits.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.cumsum, mx.cumprod and mx.sum.
# Guess before: the last number of a running sum is the sum. In NumPy both are int64, and
# mx.cumsum of truth values is int32 as their sum is.
# Seen: of 300 ones in uint8 the sum is 300 in uint32, and the running sum goes up to 255,
# 0, 44 in uint8. In int8 it goes up to 127 and on from -128. Nothing is said. Positions
# are made so from an attention mask (mx.cumsum(mask) - 1): with a mask in bytes those
# behind the 256th token begin anew. Convert the mask to int32, or to truth values, first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'numpy<3'
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
for dtype, last in ((mx.uint8, 44), (mx.int8, 44), (mx.bool_, 300), (mx.int32, 300)):
    mask = mx.ones((300,), dtype=dtype)
    running, total = mx.cumsum(mask), mx.sum(mask)
    print(f"{dtype}: sum {total.item()} {total.dtype}, last of the running sum",
          f"{running[-1].item()} {running.dtype}, least {running.min().item()}")
    assert total.item() == 300
    assert running[-1].item() == last
assert mx.cumsum(mx.ones((300,), dtype=mx.int8)).min().item() == -128
assert mx.cumprod(mx.array([100, 100], mx.uint8)).tolist() == [100, 16]
assert mx.prod(mx.array([100, 100], mx.uint8)).item() == 10000
assert np.cumsum(np.ones(300, np.uint8))[-1] == 300
PYTHON
done
echo "as written: the running sum wraps, the sum does not"
