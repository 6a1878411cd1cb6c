#!/bin/bash
# FP8 weights of a safetensors file come as the whole numbers that their bits are, and a
# layer takes them.
#
# Package: mlx 0.32.4 (CPU), mx.load and nn.Linear.load_weights.
# Guess before: an array of a type that MLX lacks is refused, or is decoded to float32.
# Seen: F8_E4M3 and F8_E8M0 come as uint8 with no word about it: 1.0 in F8_E4M3 is 56.
# F8_E5M2 is refused, and so is F64, which MLX has and reads from .npy. A layer whose
# file has 1.0 everywhere multiplies by 56. mx.from_fp8 would have given 1.0.
# mlx-lm 0.32.2 decodes such weights for some types of models (DeepSeek's), and for
# Llama's loads them and answers with noise. A server that takes any model should look
# at the weights' type before it serves them.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'numpy<3'
cd "$directory"
"$directory/venv/bin/python" - <<'PYTHON'
import json
import struct

import mlx.core as mx
import numpy as np
from mlx import nn


def load(dtype, data, shape):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    head = json.dumps({"weight": entry}).encode()
    with open("a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + data)
    try:
        found = mx.load("a.safetensors")["weight"]
    except RuntimeError as e:
        print(f"{dtype}: {e}")
        return None
    print(f"{dtype}: {found.dtype} {found.tolist()}")
    return found


ONE = b"\x38"  # 1.0 in E4M3
weight = load("F8_E4M3", ONE * 2, [1, 2])
assert weight.dtype == mx.uint8
assert weight.tolist() == [[56, 56]]
assert mx.from_fp8(weight, mx.float32).tolist() == [[1.0, 1.0]]
assert load("F8_E8M0", b"\x7f", [1]).tolist() == [127]
assert load("F8_E5M2", b"\x3c", [1]) is None
assert load("F64", struct.pack("<d", 1.0), [1]) is None
np.save("a.npy", np.ones(1))
assert mx.load("a.npy").dtype == mx.float64

layer = nn.Linear(2, 1, bias=False)
load("F8_E4M3", ONE * 2, [1, 2])
layer.load_weights("a.safetensors")
answer = layer(mx.array([1.0, 1.0])).tolist()
print(f"a layer of ones, of two ones: {answer}")
assert answer == [112.0]
PYTHON
