#!/usr/bin/env bash
# A model whose numbers are too large for float16 answers with one token, over and over.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4 (CPU), generate_step and make_sampler; 0.31.3
# with 0.31.2 but for the token.
# Models are trained in bfloat16, which has float32's range; mlx_lm.convert --dtype
# float16 makes one of them half precision, whose largest number is 65504.
# Guess before: an answer needs one likeliest token; where all log-probabilities are NaN
# there is none, so sampling raises, or draws anything.
# Seen: nothing is raised. Greedy decoding gives token 0 each time (in the vocabularies of
# Qwen and Llama 3 that is "!"). With a temperature it is the vocabulary's last token in
# mlx 0.32.4, and token 0 in 0.31.2. All log-probabilities are NaN, also of that token.
# A server answers 200 with as much of it as max_tokens allows. It should look whether the
# log-probability of a token is a number (JSON has no NaN either).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'

"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler

WORDS = 100


def answer(dtype, temperature):
    args = llama.ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
        vocab_size=WORDS, tie_word_embeddings=False,
    )
    model = llama.Model(args)
    mx.random.seed(0)
    model.load_weights(
        [
            (k, (mx.random.normal(w.shape, scale=8 if "mlp" in k else 0.3)
                 if w.ndim > 1 else w).astype(dtype))
            for k, w in tree_flatten(model.parameters())
        ]
    )
    sampler = make_sampler(temp=temperature)
    made = list(generate_step(mx.arange(5), model, max_tokens=8, sampler=sampler))
    tokens = [int(token) for token, _ in made]
    numbers = sum(int((~mx.isnan(logprobs)).sum()) for _, logprobs in made)
    print(f"{dtype}, temperature {temperature}: {tokens}, {numbers} numbers")
    return tokens, numbers


for temperature, always in ((0.0, 0), (1.0, WORDS - 1)):
    tokens, numbers = answer(mx.bfloat16, temperature)
    assert len(set(tokens)) > 4 and numbers == 8 * WORDS
    tokens, numbers = answer(mx.float16, temperature)
    assert tokens == [always] * 8 and numbers == 0
PYTHON
