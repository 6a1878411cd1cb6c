#!/usr/bin/env bash
# mlx-lm 0.32.2, `BatchGenerator`: a short prompt that is read together with a long one
# costs as much as the long one.
#
# Why: the next parts of all prompts that are read are rows of one array, each as long as
# the longest of them (`PromptProcessingBatch.prompt`). The model computes what is padding
# as it computes tokens. `mlx_lm.server` reads up to eight prompts so.
#
# One would have guessed: prompts of about the same length are read together, so that
# little is padding, and a batch costs no more tokens than its prompts alone.
#
# Seen: seven prompts of 20 tokens and one of 1,000: the model is given 1,148 tokens when
# each is read alone, and 8,008 together, 7.0 times as many.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mlx='mlx[cpu]==0.32.4'
[[ $(uname) == Darwin ]] && mlx='mlx==0.32.4'
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$mlx" 'mlx-lm==0.32.2'
"$place/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama

mx.random.seed(0)
given = []


class Counted(llama.Model):
    def __call__(self, inputs, *args, **kwargs):
        given.append(inputs.size)
        return super().__call__(inputs, *args, **kwargs)


model = Counted(
    llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64,
        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=64,
    )
)
prompts = [[5] * 20 for _ in range(7)] + [[6] * 1000]


def tokens_for(some):
    """Tokens that the model is given until each of them has its first."""
    given.clear()
    generator = BatchGenerator(model)
    generator.insert(some, [1] * len(some))
    ended = 0
    while ended < len(some):
        ended += len(generator.next()[1])
    return sum(given)


alone = sum(tokens_for([prompt]) for prompt in prompts)
together = tokens_for(prompts)
print(f"alone {alone}, together {together}: {together / alone:.1f} times")
assert alone < 1200, "what one costs alone has changed"
assert together > 5 * alone, "padding is left out now"
PYTHON
