#!/usr/bin/env bash
# mlx_lm.dwq makes a float16 model bfloat16, and one with some layers in 8 bits float32.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), dwq_quantize of
# mlx_lm.quant.dwq, with what mlx_lm.dwq gives it.
# Guess before: "learned weights" change the values of scales and biases, not their type. A model
# in float16 stays one.
# Seen: the type is bfloat16, whatever the model's is, and the command has no option for it.
# Scales, biases and norms are rounded from 11 bits to 8, even where nothing is learned, with
# a learning rate of 0. Layers of 8 bits are not trained and keep float16. A 4-bit model
# with those, as mlx_lm.convert makes it of Qwen 3's experts (their gates have 8 bits),
# then computes in float32. Its prompt cache takes twice the memory. Nothing is said.
# Convert to bfloat16 first (--dtype bfloat16), or load what comes out and set its type.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - 2> "$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import copy
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.quant.dwq import dwq_quantize

ARGS = llama.ModelArgs(
    model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=100,
    tie_word_embeddings=False,
)
EXAMPLES = [(list(range(1, 20)), 0)] * 8


def seen(model):
    cache = make_prompt_cache(model)
    logits = model(mx.array([[1, 2, 3]]), cache=cache)
    mx.eval(logits, [c.state for c in cache])
    return str(logits.dtype).rsplit(".")[-1], sum(c.nbytes for c in cache)


def types(model):
    found = {w.dtype for _, w in tree_flatten(model.parameters())}
    return {str(t).rsplit(".")[-1] for t in found - {mx.uint32}}


def look(dtype, bits_of_the_head):
    mx.random.seed(0)
    teacher = llama.Model(ARGS)
    teacher.set_dtype(dtype)
    model = copy.deepcopy(teacher)

    def bits(path, layer):
        eight = bits_of_the_head == 8 and ("lm_head" in path or "layers.0" in path)
        return hasattr(layer, "to_quantized") and {"bits": 8 if eight else 4, "group_size": 32}

    nn.quantize(model, class_predicate=bits)
    before = types(model), *seen(model)
    dwq_quantize(
        model, lambda batch, _, split: teacher(batch), mlx.optimizers.Adam(0.0),
        EXAMPLES, EXAMPLES, batch_size=4, max_seq_length=32, seed=0,
    )
    after = types(model), *seen(model)
    print(f"mlx-lm {version('mlx-lm')}, {dtype}: {before}, then {after}")
    return before, after


(_, size), = {seen(llama.Model(ARGS))}
half = size // 2
f16, b16 = {"float16"}, {"bfloat16"}
assert look(mx.bfloat16, 4) == ((b16, "bfloat16", half), (b16, "bfloat16", half))
assert look(mx.float16, 4) == ((f16, "float16", half), (b16, "bfloat16", half))
before, after = look(mx.float16, 8)
assert before == (f16, "float16", half)
assert after[0] == f16 | b16 and after[1] == "float32" and after[2] > half
PYTHON
done
