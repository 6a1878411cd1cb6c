#!/usr/bin/env bash
# The gradient of z**2 of a complex z is not that of z*z.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.grad of a real number that complex64 goes into.
# Guess before: equal functions have equal gradients, and a step against the gradient makes
# the number smaller. MLX's for abs, matmul, fft, * and / is (d/dx) + i (d/dy): it does.
# Seen: `**`, mx.power and mx.cumprod give the conjugate of that. Of Re(z**2) at 0.7 + 0.4i it
# is 1.4 + 0.8i, of Re(z*z) 1.4 - 0.8i, as differences say. Steps against it go up in the
# imaginary part. In 0.31.2 so do exp, log, sqrt, square, sin, sinh, tanh, arctan and
# others; 0.32.4 has mended those. Nothing is raised.
# Phases and filters that are learned so do not converge. Write z*z, or mx.square in 0.32.4.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

old = version("mlx") == "0.31.2"
print("mlx", version("mlx"))
at, e = 0.7 + 0.4j, 1e-2
functions = {
    "z*z": (lambda z: z * z, True),
    "abs": (lambda z: mx.abs(z), True),
    "1/z": (lambda z: 1 / z, True),
    "prod": (lambda z: mx.prod(mx.stack([z, z])), True),
    "z**2": (lambda z: z**2, False),
    "power": (lambda z: mx.power(mx.array(2 + 0j), z), False),
    "cumprod": (lambda z: mx.cumprod(mx.stack([z, z]))[1], False),
    "square": (lambda z: mx.square(z), not old),
    "exp": (lambda z: mx.exp(z), not old),
    "log": (lambda z: mx.log(z), not old),
    "sqrt": (lambda z: mx.sqrt(z), not old),
    "tanh": (lambda z: mx.tanh(z), not old),
}
for name, (f, right) in functions.items():
    def real(z):
        return mx.real(f(z))

    def slope(step):
        return ((real(mx.array(at + step)) - real(mx.array(at - step))) / (2 * e)).item()

    found = mx.grad(real)(mx.array(at)).item()
    true = complex(slope(e), slope(e * 1j))
    print(f"{name}: {found:.2f}, by differences {true:.2f}")
    assert abs((found if right else found.conjugate()) - true) < 0.02, name
    assert abs(true.imag) > 0.1, "else both would be alike"
PYTHON
done
echo "as written: the conjugate"
