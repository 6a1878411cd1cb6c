#!/usr/bin/env bash
# Under mx.vmap a function that adds two axes at once gives another array, if what is mapped
# is the last axis.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU backend), mx.vmap with in_axes=2 over
# mx.expand_dims(y, (0, 2)) and y[None, :, None].
# Guess before: it is what comes from axis 0 after mx.moveaxis, whatever axis is mapped.
# Seen: right for in_axes 0 and 1. With in_axes=2 an array of shape (2, 3, 4) gives
# (1, 1, 2, 3, 4) and not (4, 1, 2, 1, 3): the mapped axis is no longer the first, and the
# new ones are elsewhere. One axis at a time is right: y[None][:, :, None]. Numbers that
# broadcast hide it. Nothing is raised.
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
x = mx.arange(24).reshape(2, 3, 4)
WAYS = {
    "expand_dims(y, (0, 2))": lambda y: mx.expand_dims(y, (0, 2)),
    "y[None, :, None]": lambda y: y[None, :, None],
    "y[None][:, :, None]": lambda y: y[None][:, :, None],
}
for name, f in WAYS.items():
    for axis in range(3):
        rows = mx.moveaxis(x, axis, 0)
        wanted = mx.stack([f(row) for row in rows])
        found = mx.vmap(f, in_axes=axis)(x)
        print(f"{name}, in_axes={axis}: {found.shape}, wanted {wanted.shape}")
        if axis == 2 and "][" not in name:
            assert found.shape == (1, 1, 2, 3, 4)
            assert wanted.shape == (4, 1, 2, 1, 3)
        else:
            assert mx.array_equal(found, wanted)
PYTHON
done
echo "as written: two new axes at once are put elsewhere"
