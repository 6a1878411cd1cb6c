#!/usr/bin/env bash
# Half of what a client asks mlx_lm.server for is left out, with status 200.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), mlx_lm.server; openai
# 3.57.0 for Python.
# Guess before: what OpenAI's API has and this server lacks is a 400 that names it. And
# logprobs, which it has, is the same in streams.
# Seen: n=3 gives one choice, so that a vote among three is one voice. response_format gives free
# text, echo does not repeat the prompt, and suffix is not read. logprobs without
# top_logprobs has numbers and ids, and None for each token's text. A stream has no
# logprobs at all, with top_logprobs neither. Nothing says so: status 200, no header.
# Count the choices, and ask for log-probabilities without a stream, with top_logprobs.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm" 'openai==3.57.0'
  mkdir -p "$work/$mlx/hub/hub"
  HF_HOME="$work/$mlx/hub" "$work/$mlx/bin/python" - "$work/$mlx/model" <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import openai
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A model that says "!!!!", with a token for each letter.
place = Path(sys.argv[1])
place.mkdir()
letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
made = Tokenizer(models.BPE(vocab=letters, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.save(str(place / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "~"}
(place / "tokenizer_config.json").write_text(json.dumps(settings))
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=len(letters), tie_word_embeddings=False,
)
(place / "config.json").write_text(json.dumps(config))
weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
weights["lm_head.weight"] *= 0
mx.save_safetensors(str(place / "model.safetensors"), weights)

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(place), "--port", str(port)]
server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=60)


try:
    for _ in range(120):
        try:
            client.with_options(max_retries=0).models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.5)
    messages = [{"role": "user", "content": "Say hello."}]

    def chat(**options):
        return client.chat.completions.create(
            model="default_model", messages=messages, max_tokens=4, **options
        )

    def complete(**options):
        return client.completions.create(
            model="default_model", prompt="Say hello.", max_tokens=4, **options
        )

    plain, text = chat().choices[0].message.content, complete()
    three = chat(n=3, temperature=1.0, seed=1).choices
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    formed = chat(response_format=form).choices[0].message.content
    repeated, between = complete(echo=True), complete(suffix=" Bye.")
    tokens = [t.token for t in chat(logprobs=True).choices[0].logprobs.content]
    named = [t.token for t in chat(logprobs=True, top_logprobs=1).choices[0].logprobs.content]
    streamed = [
        c.choices[0].logprobs for c in chat(logprobs=True, top_logprobs=1, stream=True)
    ]
    print(f"mlx-lm {version('mlx-lm')}: {len(three)} choice of 3, {formed!r} as JSON, "
          f"{repeated.choices[0].text!r} with echo, tokens {tokens}, streamed {set(streamed)}")
    assert len(three) == 1
    assert formed == plain
    assert repeated.choices[0].text == between.choices[0].text == text.choices[0].text
    assert between.usage.prompt_tokens == text.usage.prompt_tokens == len("Say hello.")
    assert tokens == [None] * 4 and None not in named
    assert set(streamed) == {None}
finally:
    server.terminate()
    server.wait(60)
PYTHON
done
