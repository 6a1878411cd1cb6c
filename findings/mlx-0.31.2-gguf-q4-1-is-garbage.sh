#!/usr/bin/env bash
# mx.load of mlx 0.31.2 makes garbage of the Q4_1 tensors of a GGUF file.
#
# Package: mlx 0.31.2 and 0.32.4 (CPU), mx.load of .gguf; files by gguf 0.19.0.
# Guess before: mx.load keeps Q4_0, Q4_1 and Q8_0 quantized (weight, scales, biases), and what
# mx.dequantize makes of that is what llama.cpp makes of the file.
# Seen: Q4_0 and Q8_0 are right in both, and Q4_1 in 0.32.4. In 0.31.2 the numbers of Q4_1 are
# off by more than they are large. Nothing is raised.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy as np

assert version("mlx") == sys.argv[1]
Types = gguf.GGMLQuantizationType
plain = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
for kind, bits in ((Types.Q4_0, 4), (Types.Q4_1, 4), (Types.Q8_0, 8)):
    data = gguf.quants.quantize(plain, kind)
    wanted = gguf.quants.dequantize(data, kind)
    writer = gguf.GGUFWriter("a.gguf", "llama")
    writer.add_tensor("w.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = mx.load("a.gguf")
    found = mx.dequantize(
        parts["w.weight"], parts["w.scales"], parts["w.biases"], group_size=32, bits=bits
    )
    off = np.sqrt(np.mean((np.array(found) - wanted) ** 2) / np.mean(wanted**2))
    print(f"mlx {sys.argv[1]} {kind.name}: off by {off:.4f} of the numbers")
    assert off > 0.5 if (sys.argv[1], kind) == ("0.31.2", Types.Q4_1) else off < 0.002
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'gguf==0.19.0' 'numpy==2.4.6'
  "$version/bin/python" look.py "$version"
done
echo "as written: 0.31.2 reads Q4_1 wrong"
