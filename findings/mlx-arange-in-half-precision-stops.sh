#!/usr/bin/env bash
# mx.arange in half precision stops in mid-range and repeats its last number.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU backend), mx.arange with a dtype.
# Guess before: each number is start + i * step, rounded to the type. So the last is the
# nearest to the end (5,000 in float16, 4,992 in bfloat16), as in NumPy and mx.linspace.
# Seen: the step is added again and again in the type itself. The range goes up to 2,048 in
# float16 and 256 in bfloat16, and stays there: 5,000 numbers, of which 2,049 and 257 differ.
# With steps of 0.001 it is 0.5 in bfloat16 instead of 1. mx.linspace goes to the end.
# Positions and frequencies that a model makes in its own type are the same for all tokens
# behind the 256th. Make them in float32 or int32, and convert.
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
LAST = {mx.float32: 4999.0, mx.float16: 2048.0, mx.bfloat16: 256.0}
for dtype, last in LAST.items():
    found = mx.arange(0, 5000, 1, dtype=dtype)
    different = len(np.unique(np.array(found.astype(mx.float32))))
    even = mx.linspace(0, 4999, 5000, dtype=dtype)
    small = mx.arange(0, 1, 0.001, dtype=dtype)
    print(dtype, found.shape, "to", found[-1].item(), "different:", different)
    print("   linspace to", even[-1].item(), "; steps of 0.001 to", small[-1].item())
    assert found.shape == (5000,)
    assert found[-1].item() == last
    assert even[-1].item() >= 4990
assert mx.arange(0, 1, 0.001, dtype=mx.bfloat16)[-1].item() == 0.5
assert np.arange(0, 5000, 1, dtype=np.float16)[-1] == 5000
PYTHON
done
echo "as written: the range stops where a step is lost"
