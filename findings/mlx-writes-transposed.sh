#!/usr/bin/env bash
# What is read by y[0, :, a] is transposed when it is written there.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), reading and writing with a number, a slice and an
# array of indices behind it.
# Guess before: y[i] = y[i] changes nothing, whatever i is. The shape of what is written is
# that of what is read.
# Seen: y[0, :, a] is read as NumPy reads it: the indices come first, as NumPy has it when a
# slice stands between a number and an array. Written is the slice first. Where both are of
# the same length y[0, :, a] = y[0, :, a] transposes what was there, with no word about it.
# Where they are not it raises. So do y[1, 0:2, a], y[0, ..., a] and y.at[0, :, a].add.
# Right are y[:, 0, a], y[a, :, 0] and y[a, :, b]. Take the row first: row = y[0], then
# row[:, a] = ….
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
plain = np.arange(12).reshape(2, 2, 3)
a, every = np.array([0, 2]), slice(None)
both = np.array([0, 1])
TRANSPOSED = {
    "0, :, a": (0, every, a), "1, 0:2, a": (1, slice(0, 2), a), "0, ..., a": (0, ..., a),
}
RIGHT = {":, 0, a": (every, 0, a), "a, :, 0": (both, every, 0), "a, :, b": (both, every, a)}
for name, index in {**TRANSPOSED, **RIGHT}.items():
    of_mlx = tuple(mx.array(i) if isinstance(i, np.ndarray) else i for i in index)
    y = mx.array(plain)
    read = y[of_mlx]
    assert np.array_equal(np.array(read), plain[index])
    y[of_mlx] = read
    wanted = plain.copy()
    if name in TRANSPOSED:
        wanted[index] = plain[index].T
    print(f"y[{name}] = y[{name}] makes {y.tolist()} of {plain.tolist()}")
    assert np.array_equal(np.array(y), wanted)
    added = np.array(mx.array(plain).at[of_mlx].add(read))
    wanted = plain.copy()
    wanted[index] += plain[index].T if name in TRANSPOSED else plain[index]
    assert np.array_equal(added, wanted)

y = mx.zeros((2, 4, 3))
index = (0, every, mx.array([0, 2]))
assert y[index].shape == (2, 4)
try:
    y[index] = y[index]
except ValueError as e:
    print("of other lengths:", e)
else:
    raise AssertionError("taken")
PYTHON
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version" \
    'numpy<3'
  "$work/$version/bin/python" "$work/look.py"
done
echo "as written: what is written is transposed"
