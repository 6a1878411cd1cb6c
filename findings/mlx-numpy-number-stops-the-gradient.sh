#!/usr/bin/env bash
# A number of NumPy in front of an array of MLX takes what follows out of the gradient.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU) with numpy 2.4.6, mx.grad.
# Guess before: np.float64 is a float (isinstance says so), so np.sqrt(2.0) * x is what
# x * np.sqrt(2.0) is, an array of MLX with a gradient; or it is refused.
# Seen: NumPy's number is asked first, and it makes a NumPy array of x. Beside another array
# of MLX that is one of MLX again, so the value is right. The gradient is that of a
# constant: of sum(w + 3 * x) it is 0 and not 3, of sum(x + 3 * x) 1 and not 4. Nothing is
# said. np.exp(x) * x has the same fault. With x in front of the number all is right. A loss
# that is scaled so is not learned from, in part or at all.
# Scale with float(np.sqrt(d)) or math.sqrt(d).
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
x = mx.array([1.0, 2.0])
w = mx.array([10.0, 20.0])
three = np.float64(3)
assert isinstance(three, float)

cases = [
    ("w + 3 * x", lambda x: mx.sum(w + three * x), lambda x: mx.sum(w + 3.0 * x)),
    ("x + 3 * x", lambda x: mx.sum(x + three * x), lambda x: mx.sum(x + 3.0 * x)),
    ("x * exp(x)", lambda x: mx.sum(x * np.exp(x)), lambda x: mx.sum(x * mx.exp(x))),
]
seen = [[0.0, 0.0], [1.0, 1.0], None]
for (name, with_numpy, without), expected in zip(cases, seen):
    assert mx.allclose(with_numpy(x), without(x)).item(), "the value is right"
    found, right = mx.grad(with_numpy)(x).tolist(), mx.grad(without)(x).tolist()
    print(f"gradient of {name}: {found}, without NumPy {right}")
    assert found != right
    assert expected is None or found == expected

assert type(three * x) is np.ndarray
assert mx.grad(lambda x: mx.sum(w + x * three))(x).tolist() == [3.0, 3.0]
PYTHON
done
echo "as written: the gradient is lost"
