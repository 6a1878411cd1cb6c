#!/usr/bin/env bash
# mlx-lm 0.32.2 with mlx 0.32.4 (0.31.3 with 0.31.2 does the same).
#
# Guess: stream_generate calls prompt_progress_callback after each piece of a prompt,
# with a draft model as well: both models read the prompt in pieces of
# prefill_step_size, and a server sends its keepalives from there.
#
# Seen: with a draft model it is never called. stream_generate takes the argument and
# drops it, since speculative_generate_step has none. mlx_lm.server passes it on that
# way, so a client with --draft-model gets no keepalive while a long prompt is read.
#
# Exits with 1 if it is called.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'

"$work/venv/bin/python" - <<'EOF'
import sys

from mlx_lm import stream_generate
from mlx_lm.models import llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

words = Tokenizer(WordLevel({"<e>": 0, **{f"w{i}": i for i in range(1, 100)}}, "<e>"))
words.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")


def model():
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=2,
            intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=1e-5, vocab_size=100,
        )
    )


def calls(**more):
    """How often the callback is called for a prompt of 1000 tokens, 100 a piece."""
    told = []
    for _ in stream_generate(
        model(), tokenizer, [1] * 1000, max_tokens=2, prefill_step_size=100,
        prompt_progress_callback=lambda done, total: told.append(done), **more,
    ):
        pass
    return len(told)


alone, drafted = calls(), calls(draft_model=model())
print(f"calls: {alone} without a draft model, {drafted} with one")
sys.exit(not (alone > 5 and drafted == 0))
EOF
