#!/usr/bin/env bash
# bfloat16 tensors of a GGUF file come as float16, which their numbers do not fit in.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.load and mx.save_gguf; files by gguf 0.19.0.
# Guess before: BF16 comes as mx.bfloat16, bit for bit, as from safetensors. And what MLX has
# as bfloat16 is saved so.
# Seen: BF16 comes as float16. 1e5 is infinity then, and 1e-8 is 0; nothing is said. F32
# in the same file stays float32. mx.save_gguf refuses bfloat16. So a model in BF16, which
# is what models are trained in, is best read from its safetensors.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import math
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), "gguf", version("gguf"))
kind = gguf.GGMLQuantizationType.BF16
weight = np.array([[1e5, 1e-8, 1.0, -2.5]], np.float32)
writer = gguf.GGUFWriter("a.gguf", "llama")
writer.add_tensor("bf16", gguf.quants.quantize(weight, kind), raw_dtype=kind)
writer.add_tensor("f32", weight)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
found = mx.load("a.gguf")
print({name: (str(x.dtype), x.tolist()) for name, x in found.items()})
assert found["bf16"].dtype == mx.float16
assert found["bf16"].tolist() == [[math.inf, 0.0, 1.0, -2.5]]
assert np.array_equal(np.array(found["f32"]), weight)
try:
    mx.save_gguf("b.gguf", {"w": mx.array([1.0], mx.bfloat16)})
except RuntimeError as e:
    print("saved:", e)
else:
    raise AssertionError("bfloat16 is saved")
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'gguf==0.19.0' 'numpy==2.4.6'
  "$version/bin/python" look.py
done
echo "as written: BF16 comes as float16"
