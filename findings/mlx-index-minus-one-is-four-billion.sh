#!/usr/bin/env bash
# mx.argmax(x) - 1 is 4,294,967,295 where the first element is the largest.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU): mx.argmax, argmin, argsort, argpartition and
# mx.random.categorical.
# Guess before: an index can be subtracted from: -1. NumPy's and PyTorch's indices have a sign
# (int64).
# Seen: they are uint32. A subtraction below 0 and a minus sign wrap with no word, and mx.abs
# does not help: the distance of the indices 1 and 2 is 4,294,967,295 in one order.
# mx.minimum of it and 0 is 0, but mx.maximum(i - 1, 0), the way to stay in bounds, gives
# 4,294,967,295. A comparison with -1 raises. Tokens that mlx-lm samples are of this type.
# Convert indices (`.astype(mx.int32)`) before anything but indexing.
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
first, second, third = (mx.argmax(mx.array(x)) for x in ([2, 1, 1], [1, 2, 1], [1, 1, 2]))
made = [first, mx.argmin(mx.array([1, 2])), mx.argsort(mx.array([2, 1])),
        mx.argpartition(mx.array([2, 1]), 0), mx.random.categorical(mx.zeros(3))]
assert {a.dtype for a in made} == {mx.uint32}

largest = 2**32 - 1
for name, answer, guess in (
    ("first - 1", first - 1, -1),
    ("-second", -second, -1),
    ("abs(second - third)", mx.abs(second - third), 1),
    ("maximum(first - 1, 0)", mx.maximum(first - 1, 0), 0),
):
    print(f"{name}: {answer.item()}, guessed {guess}")
    assert answer.item() == largest
assert mx.maximum(first.astype(mx.int32) - 1, 0).item() == 0
try:
    print(first == -1)
except ValueError as e:
    print("first == -1 raises:", e)
else:
    raise SystemExit("first == -1 does not raise")
PYTHON
done
echo "as written: it wraps"
