#!/usr/bin/env bash
# mlx_lm.chat tells the model the system prompt, and the text's beginning, with each question.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), mlx_lm.chat.
# Guess before: what the model has read at the second question is the conversation as the chat
# template writes it: the beginning (<s>), the system prompt, question, answer, question.
# Seen: each question goes through the template alone, as a conversation of its own, behind what
# the cache holds. So <s> and the system prompt stand before each question. So does a system
# prompt that the template adds by itself, as those of Qwen 2.5 and SmolLM 2 do. What the
# template writes behind an answer's end is left out: a line's end, in those two.
# Ten short questions with a system prompt of 1,000 tokens fill 10,000 tokens of memory, and
# answers differ from those of mlx_lm.server, which gets the whole conversation.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - "$work/$mlx/model" <<'PYTHON'
import builtins
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import chat
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROLES = ["<s>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "<s>{% if messages[0].role != 'system' %}<system>Help.<end>\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# A model that answers "Yes" to everything.
place = Path(sys.argv[1])
place.mkdir()
words = sorted(pre_tokenizers.ByteLevel.alphabet())
ids = {c: i for i, c in enumerate(words)}
made = Tokenizer(models.BPE(vocab=ids, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.add_special_tokens(ROLES)
made.save(str(place / "tokenizer.json"))
settings = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<s>",
    "chat_template": TEMPLATE,
}
(place / "tokenizer_config.json").write_text(json.dumps(settings))
size = 288
config = dict(
    model_type="llama", hidden_size=size, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=size,
    tie_word_embeddings=False,
)
end = {"eos_token_id": made.token_to_id("<end>")}
(place / "config.json").write_text(json.dumps({**config, **end}))
weights = {
    k: mx.ones(w.shape) if w.ndim == 1 else mx.zeros(w.shape)
    for k, w in tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters())
}
weights["model.embed_tokens.weight"] = mx.eye(size)
said = [made.token_to_id(w) for w in ("<assistant>", "Y", "e", "s", "<end>")]
weights["lm_head.weight"][mx.array(said[1:]), mx.array(said[:-1])] = 1
mx.save_safetensors(str(place / "model.safetensors"), weights)


def read_by_the_model(*options):
    """What is in the cache at the end, as text."""
    read, caches = [], []
    call = llama.Model.__call__

    def listen(self, inputs, cache=None, **others):
        read.extend(inputs.flatten().tolist())
        caches.append(cache)
        return call(self, inputs, cache=cache, **others)

    llama.Model.__call__ = listen
    lines = iter(["One?", "Two?", "q"])
    builtins.input = lambda *_: next(lines)
    sys.argv = ["mlx_lm.chat", "--model", str(place), *options]
    chat.main()
    llama.Model.__call__ = call
    in_cache = caches[-1][0].offset
    text = made.decode(read, skip_special_tokens=False)
    print(f"mlx-lm {version('mlx-lm')}: {len(read)} read, {in_cache} in the cache: {text!r}")
    assert len(read) >= in_cache
    return text


def twice(system):
    return "".join(
        f"<s><system>{system}<end>\n<user>{question}<end>\n<assistant>Yes<end>"
        for question in ("One?", "Two?")
    )


assert read_by_the_model("--system-prompt", "Be brief.") == twice("Be brief.")
assert read_by_the_model() == twice("Help.")
PYTHON
done
