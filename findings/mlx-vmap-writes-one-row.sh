#!/usr/bin/env bash
# Under mx.vmap, `y[1:3] = 0` and `y.at[1:3].add(1)` change the first row of the batch only.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU backend), mx.vmap over a function that writes a
# number, or another array that is not mapped, into a slice of what is mapped.
# Guess before: vmap(f)(x) is f of each row, or raises as it does where an operation is not
# implemented.
# Seen: row 0 is right, every other row is as it was. So it is with y[1:3] = 0, with add,
# subtract, multiply, divide, maximum and minimum of y.at[1:3], with y.at[1], and with
# mx.slice_update. Nothing is raised. Right are an index that is an array
# (`y.at[mx.array([1, 2])]`), and a mapped array written into one that is not mapped.
# Who masks or clears a part of each row under vmap uses mx.where, or such an index.
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


def assigned(y):
    y = y + 0
    y[1:3] = 0
    return y


WRITES = {
    "y[1:3] = 0": assigned,
    "y.at[1:3].add(1)": lambda y: y.at[1:3].add(1),
    "y.at[1:3].subtract(1)": lambda y: y.at[1:3].subtract(1),
    "y.at[1:3].multiply(2)": lambda y: y.at[1:3].multiply(2),
    "y.at[1:3].divide(2)": lambda y: y.at[1:3].divide(2),
    "y.at[1:3].maximum(100)": lambda y: y.at[1:3].maximum(100),
    "y.at[1:3].minimum(0)": lambda y: y.at[1:3].minimum(0),
    "y.at[1].add(1)": lambda y: y.at[1].add(1),
    "mx.slice_update": lambda y: mx.slice_update(y, mx.zeros((2,)), mx.array([1]), (0,)),
}
x = mx.arange(12, dtype=mx.float32).reshape(3, 4) + 1
for name, write in WRITES.items():
    wanted = mx.stack([write(row) for row in x])
    found = mx.vmap(write)(x)
    print(f"{name}: wanted {wanted.tolist()}, found {found.tolist()}")
    assert mx.array_equal(found[0], wanted[0]), name
    assert mx.array_equal(found[1:], x[1:]), name

by_array = lambda y: y.at[mx.array([1, 2])].add(1)
assert mx.array_equal(mx.vmap(by_array)(x), mx.stack([by_array(row) for row in x]))
into_other = lambda y: mx.zeros((6,)).at[1:5].add(y)
assert mx.array_equal(mx.vmap(into_other)(x), mx.stack([into_other(row) for row in x]))
PYTHON
done
echo "as written: only the first row is written"
