#!/usr/bin/env bash
# mx.full with an integer type and a float value makes an array of floats.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.full(shape, value, dtype).
# Guess before: the array has the type that was asked for. So it is in NumPy, in
# mx.array(2.5, mx.int32); or it is refused, as mx.full((1,), 300, mx.int8) is.
# Seen: mx.full((1,), 2.5, dtype=mx.int32) is 2.5 in float32, and so is dtype=mx.bool_. A
# value that is whole, such as 2.0, is no better. With float16 the type is float16. So a
# fill value read from JSON or computed (`n / 2`) changes the type of what is made with
# it, and an index made so is refused far away.
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
for dtype in (mx.int32, mx.uint8, mx.int64, mx.bool_):
    for value in (2.5, 2.0, mx.array(2.5)):
        found = mx.full((1,), value, dtype=dtype)
        print(f"asked for {dtype} of {value}: {found.tolist()} {found.dtype}")
        assert found.dtype == mx.float32
        assert found.item() == float(value)
assert mx.full((1,), 2, dtype=mx.int8).dtype == mx.int8
try:
    mx.full((1,), 300, dtype=mx.int8)
except ValueError as e:
    print("300 in int8:", e)
else:
    raise AssertionError("taken")
assert mx.full((1,), 2.5, dtype=mx.float16).dtype == mx.float16
assert mx.array(2.5, mx.int32).dtype == mx.int32
indices = mx.full((1,), 2.0, dtype=mx.int32)
try:
    mx.arange(5)[indices]
except ValueError as e:
    print("as an index:", e)
else:
    raise AssertionError("taken as an index")
PYTHON
done
echo "as written: the type that was asked for is not taken"
