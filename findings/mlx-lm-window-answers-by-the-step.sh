#!/usr/bin/env bash
# With --max-kv-size the answer depends on how a prompt is cut into pieces.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), generate_step with
# max_kv_size (Qwen 3's class), RotatingKVCache with keep.
# Guess before: prefill_step_size is about speed and memory, "step size for processing the prompt".
# Each token sees the first four and the last max_kv_size - 4, as the cache holds them, in
# pieces of one or of 2,048. Without a window, and in one without kept tokens, that is so.
# Seen: within a piece the window is the last max_kv_size. The first four are masked once they
# are behind it, though the cache keeps them. A token that comes alone sees them. So the
# prompt is read without them, and the answer written with them. Of a prompt of 40 tokens in a
# window of 16 the next token's probabilities differ by 13% between pieces of 1 and 2,048.
# What such a server answers changes with its --prefill-step-size. Keep to one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache, RotatingKVCache

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
args = qwen3.ModelArgs.from_dict({
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "vocab_size": 100, "rope_theta": 1e4, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
})
mx.random.seed(0)
model = qwen3.Model(args)
model.update({"model": {"embed_tokens": {"weight": 0.2 * mx.random.normal((100, 64))}}})
prompt = mx.array([7 * i % 97 for i in range(40)])


def probabilities(step, cache=None, size=None):
    """Of the token after the prompt, which is read in pieces of `step`."""
    steps = generate_step(prompt, model, max_tokens=1, prefill_step_size=step,
                          prompt_cache=cache and [cache() for _ in range(2)], max_kv_size=size)
    return mx.exp(next(steps)[1])


def moved(**how):
    alone = probabilities(1, **how)
    return [(mx.abs(probabilities(step, **how) - alone).sum() / 2).item()
            for step in (2, 8, 2048)]


for name, how in (
    ("no window", {"cache": KVCache}),
    ("a window of 16", {"cache": lambda: RotatingKVCache(16)}),
    ("max_kv_size=16", {"size": 16}),
):
    found = moved(**how)
    print(f"{name}: pieces of 2, 8, 2048 move", [f"{part:.1%}" for part in found])
    assert found[2] > 0.05 if "size" in how else max(found) < 1e-4
PYTHON
done
echo "as written: the pieces decide"
