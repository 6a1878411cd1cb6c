#!/usr/bin/env bash
# mx.load reads half of each Q4_K tensor of a GGUF file wrong.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.load of .gguf; gguf 0.19.0 (llama.cpp's own
# package) for what is right.
# Guess before: a type that mx.load knows is read as llama.cpp reads it, to float16's
# precision; others are refused, as Q5_K and Q3_K are.
# Seen: a block of Q4_K has eight groups of 32 numbers, each with a scale and a minimum.
# Groups 0, 2, 4 and 6 are right. 1, 3, 5 and 7 come with the scale and the minimum of the
# group before. Nothing is raised. Q6_K, Q2_K, Q4_0 and Q8_0 are right. Q4_K is what most of
# the files in the format "Q4_K_M" consist of.
# Convert such models from their safetensors instead.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), "gguf", version("gguf"))
Types = gguf.GGMLQuantizationType
rng = np.random.default_rng(1)
# Where a block has its scale, and what it has beside it, in float16.
SCALES = {Types.Q4_K: slice(0, 4), Types.Q2_K: slice(-4, None), Types.Q6_K: slice(-2, None)}
for kind, place in SCALES.items():
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, size=(8, size), dtype=np.uint8)
    scales = np.float16([0.01, 0.003]).view(np.uint8)
    data[:, place] = scales[: len(data[0, place])]
    writer = gguf.GGUFWriter("a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = gguf.quants.dequantize(data, kind).reshape(-1, 8, 32)
    found = np.array(mx.load("a.gguf")["w"].astype(mx.float32)).reshape(-1, 8, 32)
    off = np.abs(found - wanted).max(axis=(0, 2))
    print(f"{kind.name}: off by {[f'{x:.3f}' for x in off]}, up to {np.abs(wanted).max():.1f}")
    if kind == Types.Q4_K:
        assert (off[::2] < 0.01).all()
        assert (off[1::2] > 1).all()
        # The group before has the scale and minimum that were taken.
        low, high = data[:, 16:48] & 15, data[:, 16:48] >> 4
        one = (wanted[:, 0].max(1) - wanted[:, 0].min(1)) / (np.ptp(low, axis=1))
        base = wanted[:, 0].min(1) - one * low.min(1)
        taken = one[:, None] * high + base[:, None]
        assert np.allclose(found[:, 1], taken, atol=0.02)
    else:
        assert (off < 0.04).all()
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'gguf==0.19.0' 'numpy==2.4.6'
  "$version/bin/python" look.py
done
echo "as written: every second group has the scale of the one before"
