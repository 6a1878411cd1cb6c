#!/usr/bin/env bash
# The mean of many ones in half precision is not one in MLX.
#
# Package: mlx 0.31.2 and 0.32.4 (CPU backend), mx.mean, mx.sum and mx.var.
# Guess before: the mean of numbers between 0 and 8 is between 0 and 8 and right to the
# type's precision. NumPy and PyTorch add half precision up in float32.
# Seen: the sum is made in the type itself and divided then. In 0.31.2 it stands still where
# one more is lost: at 2,048 in float16 and 256 in bfloat16: the mean of 4,000 ones is 0.51
# and 0.064, whole or by columns, with no word about it. In 0.32.4 the sum is right, but
# float16 ends at 65,504. The mean of 100,000 ones is infinite, and so is that of 8,192 rows
# of 8.0, and the variance of numbers with a deviation of 10. In bfloat16 it is right.
# Mean pooling of an embedding model over a long text is wrong in half precision. Convert
# to float32 before the mean.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'numpy<3'
  "$work/$version/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import mlx.core as mx
import numpy as np

half, brain = mx.float16, mx.bfloat16
old = version("mlx") == "0.31.2"
print("mlx", version("mlx"))


def mean(count, dtype, value=1.0):
    """Of rows that are all alike, one column."""
    return mx.mean(mx.full((count, 4), value, dtype), axis=0)[0].item()


for dtype in (half, brain, mx.float32):
    found = mean(4000, dtype), mean(100_000, dtype), mean(8192, dtype, 8.0)
    print(dtype, "4,000 and 100,000 ones, 8,192 eights:", *found)
assert mean(4000, mx.float32) == mean(100_000, mx.float32) == 1
assert np.mean(np.ones(100_000, np.float16)) == 1
if old:
    assert mx.sum(mx.ones(4000, half)).item() == 2048
    assert mx.sum(mx.ones(4000, brain)).item() == 256
    assert abs(mean(4000, half) - 0.512) < 0.001
    assert abs(mean(4000, brain) - 0.064) < 0.001
else:
    assert mean(4000, half) == mean(4000, brain) == mean(100_000, brain) == 1
    assert math.isinf(mean(100_000, half))
    assert math.isinf(mean(8192, half, 8.0))
    mx.random.seed(1)
    spread = 10 * mx.random.normal((100_000,)).astype(half)
    assert math.isinf(mx.var(spread).item())
PYTHON
done
echo "as written: a mean is a sum in half precision first"
