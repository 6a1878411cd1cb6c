#!/usr/bin/env bash
# The gradient of a polynomial at 0 is NaN, if it is written with powers.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.grad over x ** 0 and x ** mx.arange(n).
# Guess before: x ** 0 is 1 for each x, 0 too, so its gradient is 0 everywhere.
# Seen: at 0 the value is 1 and the gradient NaN: 0 (the exponent) times 0 ** -1, infinity. The
# usual way to write a polynomial or its features is sum(c * x ** [0, 1, 2, 3]). One 0 among
# its inputs makes the gradient there NaN, and with a weight in front of it the whole
# weight. It is right everywhere else, so it comes with the first padded or empty input.
# Begin with x ** 1 and add the constant, or use Horner's scheme.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import mlx.core as mx

print("mlx", version("mlx"))
c = mx.array([1.0, 2.0, 3.0, 4.0])


def powers(x):
    return (c * x[:, None] ** mx.arange(4)).sum()


def horner(x):
    return (c[0] + x * (c[1] + x * (c[2] + x * c[3]))).sum()


x = mx.array([0.5, 0.0, -1.0])
assert mx.allclose(powers(x), horner(x)).item(), "the value is right"
found, right = mx.grad(powers)(x).tolist(), mx.grad(horner)(x).tolist()
print("gradient with powers:", found, "by Horner:", right)
assert math.isnan(found[1]) and right[1] == 2.0
assert abs(found[0] - right[0]) < 1e-5 and abs(found[2] - right[2]) < 1e-5

weight = mx.grad(lambda w: powers(w * x))(mx.array(1.0)).item()
print("gradient of a weight in front:", weight)
assert math.isnan(weight)
one = mx.grad(lambda x: (x**0).sum())(x).tolist()
print("gradient of x ** 0:", one)
assert math.isnan(one[1]) and one[0] == one[2] == 0
PYTHON
done
echo "as written: NaN"
