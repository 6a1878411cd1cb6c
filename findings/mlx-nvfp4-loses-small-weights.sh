#!/usr/bin/env bash
# Weights in groups whose largest is below 0.006 become 0 in "nvfp4".
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.quantize and nn.quantize.
# Guess before: as in the other modes, each group has a scale of its own. So the error
# is a part of the group's largest number however small that is (for nvfp4 some 10%).
# Seen, of normal weights of that deviation, the relative error and how many become 0:
#   0.02:  affine 0.09  mxfp4 0.12  nvfp4 0.10    7%
#   0.005: affine 0.09  mxfp4 0.12  nvfp4 0.14    9%
#   0.002: affine 0.09  mxfp4 0.12  nvfp4 0.96   96%
#   0.001: affine 0.09  mxfp4 0.12  nvfp4 1.00  100%
# A group's scale is its largest number / 6 in E4M3, whose smallest number is 2^-9. Up to
# half of that, a largest number of 6 * 2^-10, the scale is 0. The NVFP4 format has a
# second scale against that, a float32 for the whole array. `global_scale` of mx.quantize
# is that scale (with it: 0.10 for all), and is off by default. mlx_lm's quantize_model
# (0.32.2) offers it for layers of experts only. Nothing is raised, and the layer answers 0.
# Who converts a model should look at how many of its numbers are 0 afterwards.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4'

"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import mlx.nn as nn


def lost(deviation, mode, **options):
    """The relative error of quantized weights, and the part of them that is 0."""
    mx.random.seed(0)
    weights = mx.random.normal((256, 512)) * deviation
    if options:
        options["global_scale"] = mx.abs(weights).max()
    made = mx.dequantize(*mx.quantize(weights, mode=mode, **options), mode=mode, **options)
    off = mx.sqrt(mx.square(made - weights).sum() / mx.square(weights).sum()).item()
    zeros = (made == 0).astype(mx.float32).mean().item()
    print(f"{deviation:5} {mode:6} {'global_scale' if options else '':12} "
          f"error {off:.2f}, zeros {zeros:.0%}")
    return off, zeros


for deviation in (0.02, 0.005, 0.002, 0.001):
    for mode in ("affine", "mxfp4"):
        assert lost(deviation, mode)[0] < 0.15
    off, zeros = lost(deviation, "nvfp4")
    assert (off < 0.15) if deviation >= 0.005 else (zeros > 0.9)
    assert lost(deviation, "nvfp4", global_scale=True)[0] < 0.15

layer = nn.Linear(512, 256, bias=False)
layer.weight = mx.random.normal((256, 512)) * 0.001
answer = nn.QuantizedLinear.from_linear(layer, 16, 4, "nvfp4")(mx.ones((1, 512)))
print("a layer's answer:", answer.min().item(), "to", answer.max().item())
assert not answer.any().item()
PYTHON
