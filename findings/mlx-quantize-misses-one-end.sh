#!/usr/bin/env bash
# An affine quantized weight can be wrong by a whole step, and not by half of one.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.quantize, mode "affine" (the usual one).
# Guess before: what its documentation says: s = (max - min) / (2^bits - 1), a weight is
# round((w - min) / s). So the largest and the smallest of a group are exact, and each
# weight is wrong by s / 2 at most.
# Seen: s is changed so that 0 is exact, and the range is moved by that. It then ends before
# the other end of the group, and what is beyond is cut. A group from -1 to 1 is
#   with 5 bits -0.9375 to 1 (wrong by 0.97 of a step), with 2 bits -0.5 to 1.
# Of normal weights in groups of 64, 1% (4 bits) are wrong by more than half a step, up to
# 0.94 of one. They are at one end of their groups, so among the largest.
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
assert "{2^b - 1}" in mx.quantize.__doc__, "the formula in the documentation"


def back(weights, bits):
    return mx.dequantize(*mx.quantize(weights, 64, bits), group_size=64, bits=bits)


ends = mx.array([[-1.0, 1.0] + [0.0] * 62])
for bits, low in ((2, -0.5), (5, -0.9375)):
    found = back(ends, bits)[0, :2].tolist()
    step = 2 / (2**bits - 1)
    print(f"{bits} bits: -1 and 1 are {found}; a step is {step:.3f}")
    assert found == [low, 1.0]
    assert 0.7 * step < low + 1 < step

mx.random.seed(0)
weights = mx.random.normal((4096, 64)) * 0.02
low, high = weights.min(1, keepdims=True), weights.max(1, keepdims=True)
for bits in (4, 5, 8):
    step = (high - low) / (2**bits - 1)
    off = mx.abs(back(weights, bits) - weights) / step
    by_formula = mx.abs(mx.round((weights - low) / step) * step + low - weights) / step
    share = (off > 0.51).mean().item()
    print(f"{bits} bits: off by {off.max().item():.2f} of a step at most, by the formula"
          f" {by_formula.max().item():.2f}; {share:.1%} by more than half")
    assert off.max().item() > 0.9
    assert by_formula.max().item() < 0.51
    assert share > 0.003
PYTHON
done
echo "as written: a weight is wrong by up to a whole step"
