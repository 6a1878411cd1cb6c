#!/usr/bin/env bash
# mx.divmod(1.0, 0.1) is 10 and 0.1, which make 1.1; and its remainder has no gradient.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.divmod, `//` and `%` of floats.
# Guess before: quotient times divisor and the remainder make the number again, as Python and
# NumPy have it: 9 and 0.1 (0.1 in binary is a little more than a tenth). And what mx.divmod
# gives is what mx.remainder gives, its gradient too.
# Seen: the quotient is the rounded one, rounded down: 10; the remainder is exact, 0.1. So a
# position that is cut into a block and a place in it can be one block too far. The
# gradient of the remainder is 1 with mx.remainder, and 0 with mx.divmod, without a word.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
for number, by in ((1.0, 0.1), (0.7, 0.1), (6.0, 0.1)):
    quotient, rest = (x.item() for x in mx.divmod(mx.array(number), mx.array(by)))
    right = np.divmod(np.float32(number), np.float32(by))
    print(f"divmod({number}, {by}): {quotient} and {rest:.4f}, together"
          f" {quotient * by + rest:.4f}; NumPy {right[0]} and {right[1]:.4f}")
    assert quotient == right[0] + 1
    assert abs(rest - right[1]) < 1e-6
    assert (mx.array(number) // by).item() == quotient

x = mx.array([0.3, 1.7])
of_remainder = mx.grad(lambda x: mx.remainder(x, 1.0).sum())(x).tolist()
of_divmod = mx.grad(lambda x: mx.divmod(x, 1.0)[1].sum())(x).tolist()
print(f"gradient of mx.remainder {of_remainder}, of mx.divmod's {of_divmod}")
assert of_remainder == [1.0, 1.0]
assert of_divmod == [0.0, 0.0]
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version" \
    'numpy<3'
  "$version/bin/python" look.py
done
echo "as written: quotient and remainder disagree"
