#!/usr/bin/env bash
# A weight that is NaN is an ordinary number once it is quantized.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.quantize and mx.quantized_matmul.
# Guess before: what is NaN stays NaN, or its group does, as with all other operations. A
# model with a broken weight answers with NaN, which a test finds.
# Seen, of a group of 0.5 with one NaN among them:
#   affine: the NaN is 0.5 as the others; mxfp4, nvfp4: the whole group is 0.
#   mxfp8: the whole group is 896 (0.31.2 as well).
# Infinity: affine makes the group NaN; mxfp4 and nvfp4 0, mxfp8 896. So a model whose
# training or conversion has overflown is quantized without a word. It answers, in part with
# the weights of nothing. Look at the weights (mx.isfinite) before they are quantized.
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
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
SEEN = {"affine": 0.5, "mxfp4": 0.0, "nvfp4": 0.0, "mxfp8": 896.0}
for mode, (group_size, bits) in MODES.items():
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    for bad in (math.nan, math.inf):
        weight = mx.full((1, 64), 0.5)
        weight[0, 3] = bad
        parts = mx.quantize(weight, **how)
        back = mx.dequantize(*parts, **how)
        product = mx.quantized_matmul(mx.ones((1, 64)), *parts, **how).item()
        print(f"{mode} {bad}: it {back[0, 3].item()}, its neighbour {back[0, 4].item()},"
              f" times ones {product}")
        if mode == "affine" and bad == math.inf:
            assert math.isnan(back[0, 4].item())
        else:
            assert back[0, 3].item() == back[0, 4].item() == SEEN[mode]
            assert math.isfinite(product)
PYTHON
done
echo "as written: a NaN is hidden"
