#!/usr/bin/env bash
# mx.load leaves tensors of a GGUF file out without a word.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.load of .gguf; files by gguf 0.19.0.
# Guess before: a tensor of a type that mx.load does not know is an error, as Q5_0 and F64
# are ("[load_gguf] gguf_tensor_to_f16 failed").
# Seen: tensors in MXFP4 (the experts of gpt-oss), TQ1_0 and TQ2_0 are not among what is
# returned, and nothing is said. The others are. A model that is built of that by name,
# with load_weights(strict=False), answers with the weights that it was made with.
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
weight = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)


def loaded(kind):
    writer = gguf.GGUFWriter("a.gguf", "llama")
    writer.add_tensor("plain", weight)
    writer.add_tensor("other", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    in_file = sorted(tensor.name for tensor in gguf.GGUFReader("a.gguf").tensors)
    assert in_file == ["other", "plain"]
    try:
        return sorted(mx.load("a.gguf"))
    except RuntimeError as e:
        return str(e)


for kind in (Types.MXFP4, Types.TQ1_0, Types.TQ2_0):
    found = loaded(kind)
    print(f"a file with 'plain' in F32 and 'other' in {kind.name}: {found}")
    assert found == ["plain"]
assert loaded(Types.BF16) == ["other", "plain"]
refused = loaded(Types.Q5_0)
print("Q5_0:", refused)
assert refused == "[load_gguf] gguf_tensor_to_f16 failed"
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'gguf==0.19.0' 'numpy==2.4.6'
  "$version/bin/python" look.py
done
echo "as written: tensors are left out"
