#!/usr/bin/env bash
# A NumPy array beside an array of MLX becomes of that array's type, so 0.5 becomes 0.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU) with numpy 2.4.6; an operator or a function of
# mlx.core with one mx.array and one NumPy array.
# Guess before: as with two arrays of MLX: int32 and float32 give float32. It is only Python's
# own numbers that take the type of the array beside them.
# Seen: the NumPy array is converted to the other one's type, whatever it loses. [3, 2] in
# int32 times [0.5, 0.5] is [0, 0]. [1, 2] < [1.5, 1.5] is False twice, mx.maximum of them
# [1, 2]. 300 added to int8 is 44 more, 200 - 201 in uint8 is 255, 1e5 beside float16 is
# infinite, and the imaginary part is cut off. Nothing is said. The other way round, NumPy's
# array first, the answer is NumPy's and right.
# Write mx.array(a) around what comes from NumPy (prices, masks, biases for logits).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'numpy==2.4.6'
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
half = np.array([0.5, 0.5])
large = np.array([1.5, 1.5])


def look(name, answer, dtype, expected, guessed):
    print(f"{name}: {answer.tolist()} in {answer.dtype}; guessed {guessed}")
    assert answer.dtype == dtype
    assert answer.tolist() == expected != guessed


ints = mx.array([3, 2])
small = mx.array([1, 2])
look("[3, 2] * 0.5", ints * half, mx.int32, [0, 0], [1.5, 1.0])
look("[1, 2] < 1.5", small < large, mx.bool_, [False, False], [True, False])
look("maximum of [1, 2] and 1.5", mx.maximum(small, large), mx.int32, [1, 2], [1.5, 2.0])
look("int8 [1] + 300", mx.array([1], mx.int8) + np.array([300]), mx.int8, [45], [301])
look("uint8 [200] - 201", mx.array([200], mx.uint8) - np.array([201]), mx.uint8, [255], [-1])
look("float16 [1] * 1e5", mx.array([1], mx.float16) * np.array([1e5], np.float32),
     mx.float16, [float("inf")], [1e5])
look("float32 [1] + 1j", mx.array([1.0]) + np.array([1j]), mx.float32, [1.0], [1 + 1j])

# What one would have guessed, and what comes when both are MLX's or NumPy's is first.
assert (ints * mx.array(half)).tolist() == [1.5, 1.0]
assert (half * ints).tolist() == [1.5, 1.0]
PYTHON
done
echo "as written: the NumPy array gives way"
