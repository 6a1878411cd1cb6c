#!/usr/bin/env bash
# mlx-data takes NumPy's big-endian arrays, and reads their bytes the other way round.
#
# Package: mlx-data 0.1.0 (Linux), buffer_from_vector and key_transform; mlx 0.32.4, numpy 2.4.6.
# Guess before: 1, 2 and 3. Or an error, as mx.array and mlx-data's own load_numpy raise for
# them, and as mlx-data does for types that it does not know (uint16, bool).
# Seen: big-endian 1, 2, 3 come as 16777216, 33554432, 50331648, in floats as numbers near 0, and
# NumPy's own sum of what comes is of those. The type is said to be the ordinary int32 or
# float32. Nothing is raised. It is the same with what a function in key_transform returns.
# Such arrays are what np.frombuffer(..., ">i4") and readers of FITS, NetCDF and MNIST's own
# files give. Call array.astype("i4") first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'mlx-data==0.1.0' 'numpy==2.4.6'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys

import mlx.core as mx
import mlx.data
import numpy as np


def given(array):
    return mlx.data.buffer_from_vector([{"x": array}])[0]["x"]


def returned(array):
    buffer = mlx.data.buffer_from_vector([{"x": 0}])
    return buffer.key_transform("x", lambda _: array)[0]["x"]


def raised(function):
    try:
        function()
    except (RuntimeError, ValueError) as e:
        return f"{type(e).__name__}: {str(e).split(' file ')[0]}"
    return None


for letter in ("i4", "i8", "f4", "f8"):
    right = np.array([1, 2, 3], letter)
    big = right.astype(">" + letter)
    assert (big == right).all()
    for give in (given, returned):
        assert (give(right) == right).all()
        found = give(big)
        print(f"{give.__name__} {big.dtype.str}: {found.dtype.str} {found.tolist()}")
        assert found.dtype == right.dtype
        assert found.tobytes() == right.byteswap().tobytes()
np.save(f"{sys.argv[1]}/big.npy", big)
of_file = mlx.data.buffer_from_vector([{"x": f"{sys.argv[1]}/big.npy".encode()}])
for error in (
    raised(lambda: mx.array(big)),
    raised(lambda: of_file.load_numpy("x")[0]),
    raised(lambda: given(np.array([1], np.uint16))),
):
    print(error)
    assert error
PYTHON
