#!/usr/bin/env bash
# mlx-lm 0.31.3, `BatchGenerator`: once a request without a sampler of its own has ended,
# the sampler and the logits processors of the next one are left out.
#
# Why: `GenerationBatch.filter` takes the places of those that have ended out of
# `samplers` and `logits_processors` only `if any(...)`. In a batch where nobody has any,
# the places stay, and the next request's come behind them: its row reads the first.
# mlx-lm 0.32.2 takes them out always. `mlx_lm.server` gives each request a sampler, so
# there only penalties are lost.
#
# One would have guessed: each request of a batch has what it was inserted with.
#
# Seen: alone [6, 32, 6, 32, 6, 32], after a plain request [6, 6, 6, 6, 6, 6]. Only the first
# token is by the sampler, the others are the likeliest.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mlx='mlx[cpu]==0.31.2'
[[ $(uname) == Darwin ]] && mlx='mlx==0.31.2'
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$mlx" 'mlx-lm==0.31.3'
"$place/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama

mx.random.seed(0)
model = llama.Model(
    llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64,
        num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=64,
    )
)


def answer(generator, **own):
    (uid,) = generator.insert([[5, 6, 7]], [6], **own)
    tokens = []
    while len(tokens) < 6:
        tokens += [told.token for told in generator.next()[1]]
    return tokens


def least_likely(logprobs):
    return mx.argmin(logprobs, axis=-1)


alone = answer(BatchGenerator(model), samplers=[least_likely])
generator = BatchGenerator(model)
plain = answer(generator)
after = answer(generator, samplers=[least_likely])
print(f"alone {alone}\nafter a plain request {after}\nwithout a sampler {plain}")
assert alone != plain, "the sampler makes no difference"
# The first token is still made in a batch of its own.
assert after[0] == alone[0], "the first token has changed"
assert after != alone, "the sampler is used for all tokens now"
PYTHON
