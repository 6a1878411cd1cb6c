#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (0.31.3 with 0.31.2 does the same).
#
# Guess: speculative decoding is exact. With greedy sampling the text is that of the
# target alone, whatever the draft. A target whose cache cannot take tokens back is
# refused, as a recurrent one is ("Speculative decoding requires a trimmable prompt
# cache").
#
# Seen: a target with sliding-window layers (here Gemma 3's type) is let through. The
# question is asked once, while its caches are empty, and a RotatingKVCache says yes
# until its window is full. From there on trim_prompt_cache takes nothing back and says
# nothing: tokens that were refused stay in the cache, and the text is another.
#
# Exits with 1 if the texts are the same, or if the pair is refused.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'

"$work/venv/bin/python" - <<'EOF'
import sys

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import gemma3_text

WINDOW, LENGTH = 32, 60


def model(seed):
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text", hidden_size=64, num_hidden_layers=4,
        intermediate_size=128, num_attention_heads=4, head_dim=16, vocab_size=300,
        num_key_value_heads=2, query_pre_attn_scalar=16, sliding_window=WINDOW,
        sliding_window_pattern=2,
    )
    made = gemma3_text.Model(args)
    mx.random.seed(seed)
    made.load_weights(
        [
            (name, mx.random.normal(w.shape, scale=0.3) if w.ndim > 1 else w)
            for name, w in tree_flatten(made.parameters())
        ]
    )
    return made


target, draft = model(0), model(1)
prompt = mx.arange(10)
alone = [int(t) for t, _ in generate_step(prompt, target, max_tokens=LENGTH)]
drafted = [
    int(t) for t, *_ in speculative_generate_step(prompt, target, draft, max_tokens=LENGTH)
]
same = next((i for i, (a, b) in enumerate(zip(alone, drafted)) if a != b), LENGTH)
print(f"greedy tokens that are the same: {same} of {LENGTH} (window {WINDOW}, prompt 10)")
sys.exit(same == LENGTH)
EOF
