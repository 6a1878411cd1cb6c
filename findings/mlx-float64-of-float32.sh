#!/usr/bin/env bash
# float64 in MLX is float32 in some operations: exp, sin, cos, softmax, convolutions.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU; MLX has float64 on the CPU only).
# Guess before: an operation that takes float64 and gives float64 is right to about 1e-15;
# what cannot be is refused, as mx.random.uniform refuses it.
# Seen, the largest relative error for numbers between 0.1 and 0.9, with the type float64:
#   exp, sin, cos, sigmoid, logsumexp, softmax, logaddexp, logcumsumexp, convolve, conv1d,
#   mx.fast.rms_norm and round(x, 3) 1e-8 to 1e-7; erf 1e-6.
#   tan, sinh, tanh, log, power, arctan2, matmul, cholesky, svd: below 1e-14.
# So a reference in float64, or a gradient by differences, is right only as far as it calls
# none of the first. NumPy's are exact in all of them.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'numpy<3'
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version
from math import erf

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
rng = np.random.default_rng(0)
x, y = rng.uniform(0.1, 0.9, (2, 4, 8))
X, Y = mx.array(x, mx.float64), mx.array(y, mx.float64)
e = np.exp(x)
ROUGH = {
    "exp": (mx.exp(X), e),
    "sin": (mx.sin(X), np.sin(x)),
    "cos": (mx.cos(X), np.cos(x)),
    "erf": (mx.erf(X), np.vectorize(erf)(x)),
    "sigmoid": (mx.sigmoid(X), 1 / (1 + np.exp(-x))),
    "logsumexp": (mx.logsumexp(X, 1), np.log(e.sum(1))),
    "softmax": (mx.softmax(X, 1), e / e.sum(1, keepdims=True)),
    "softmax, precise": (mx.softmax(X, 1, precise=True), e / e.sum(1, keepdims=True)),
    "logaddexp": (mx.logaddexp(X, Y), np.logaddexp(x, y)),
    "logcumsumexp": (mx.logcumsumexp(X, 1), np.log(np.cumsum(e, 1))),
    "convolve": (mx.convolve(X[0], Y[0]), np.convolve(x[0], y[0])),
    "conv1d": (mx.conv1d(X[None], Y[None, :1]), (x * y[0]).sum(1)[None, :, None]),
    "rms_norm": (
        mx.fast.rms_norm(X, None, 1e-5),
        x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5),
    ),
    "round(x, 3)": (mx.round(X, 3), np.round(x, 3)),
}
s = x @ x.T + np.eye(4)
EXACT = {
    "tan": (mx.tan(X), np.tan(x)),
    "sinh": (mx.sinh(X), np.sinh(x)),
    "tanh": (mx.tanh(X), np.tanh(x)),
    "log": (mx.log(X), np.log(x)),
    "power": (mx.power(X, Y), x**y),
    "arctan2": (mx.arctan2(X, Y), np.arctan2(x, y)),
    "matmul": (X @ Y.T, x @ y.T),
    "cholesky": (
        mx.linalg.cholesky(mx.array(s, mx.float64), stream=mx.cpu),
        np.linalg.cholesky(s),
    ),
    "svd": (mx.linalg.svd(X, stream=mx.cpu)[1], np.linalg.svd(x)[1]),
}


def error(found, wanted):
    assert found.dtype == mx.float64
    return np.max(np.abs(np.array(found) - wanted) / np.maximum(np.abs(wanted), 1e-12))


for name, pair in ROUGH.items():
    print(f"{name}: {error(*pair):.0e}")
    assert 1e-10 < error(*pair) < 1e-4, name
for name, pair in EXACT.items():
    print(f"{name}: {error(*pair):.0e}")
    assert error(*pair) < 1e-14, name
PYTHON
done
echo "as written: float64 is float32 in some operations"
