#!/usr/bin/env bash
# In a shapeless function x[-1] is the last element of the array that it was made with.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.compile and mx.export_function with shapeless=True.
# Guess before: -1 is the last element whatever the length, as it is in Python and in ONNX. What
# cannot be without the shape raises, as x[:-1], x[-2:], x[::-1] and h[:, -1] do here.
# Seen: x[-1] becomes x[5] when a function is compiled or exported with six elements, and stays
# that: with eight it takes the sixth, with no word. x.at[-1].add writes there.
# `mx.take(x, mx.array(-1), 0)` is right. The last token of a sequence is what such a
# function is asked for; batches without a batch axis get another one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  (cd "$work" && "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

print("mlx", version("mlx"))
six, eight = mx.arange(10, 16), mx.arange(10, 18)


def shapeless(f):
    """What f of eight is, compiled and exported with six."""
    compiled = mx.compile(f, shapeless=True)
    compiled(six)
    mx.export_function("f.mlxfn", f, six, shapeless=True)
    return compiled(eight).tolist(), mx.import_function("f.mlxfn")(eight)[0].tolist()


def last(x):
    return x[-1]


def add(x):
    return x.at[-1].add(100)


def taken(x):
    return mx.take(x, mx.array(-1), 0)


for f, seen in ((last, 15), (add, [10, 11, 12, 13, 14, 115, 16, 17])):
    found = shapeless(f)
    print(f.__name__, found, "guessed", f(eight).tolist())
    assert found == (seen, seen)
assert shapeless(taken) == (17, 17)
PYTHON
  )
done
echo "as written: the old last one"
