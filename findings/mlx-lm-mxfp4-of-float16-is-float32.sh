#!/usr/bin/env bash
# A float16 model that is quantized to mxfp4, mxfp8 or nvfp4 computes in float32, and its
# prompt cache takes twice the memory.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), utils.quantize_model,
# as in `mlx_lm.convert -q --q-mode mxfp4`.
# Guess before: quantization changes how weights are stored. What is computed, and what the
# cache keeps, has the model's own type, as in the mode "affine".
# Seen: in these modes the scales have no type of their own, so mx.dequantize gives
# bfloat16, and so does the embedding. bfloat16 times a float16 norm is float32 from there
# on: the answers, and the keys and values in the cache. With "affine" all is float16, and a
# bfloat16 model stays bfloat16 in every mode.
# Convert such a model with --dtype bfloat16.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  python3 -m venv "$work/${pair%/*}"
  "$work/${pair%/*}/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/${pair%/*}/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

print("mlx", version("mlx"), "mlx-lm", version("mlx-lm"))


def made(dtype, mode):
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=1, vocab_size=64,
            intermediate_size=128, num_attention_heads=2, rms_norm_eps=1e-5,
        )
    )
    model.set_dtype(dtype)
    return quantize_model(model, {}, None, None, mode=mode)[0]


for dtype, others in ((mx.float16, mx.float32), (mx.bfloat16, mx.bfloat16)):
    sizes = {}
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        model = made(dtype, mode)
        cache = make_prompt_cache(model)
        answer = model(mx.array([[1, 2, 3]]), cache=cache)
        sizes[mode] = cache[0].nbytes
        print(f"{dtype} {mode}: answers {answer.dtype}, keys {cache[0].keys.dtype},"
              f" cache {sizes[mode]} bytes")
        expected = dtype if mode == "affine" else others
        assert answer.dtype == cache[0].keys.dtype == cache[0].values.dtype == expected
    if dtype == mx.float16:
        assert sizes["mxfp4"] == 2 * sizes["affine"]
PYTHON
done
echo "as written: float16 becomes float32"
