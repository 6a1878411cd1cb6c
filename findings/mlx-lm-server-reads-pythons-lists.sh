#!/usr/bin/env bash
# A model without a chat template reads "[{'type': 'text', …}]" where a client sends text.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), mlx_lm.server; openai
# 3.57.0 for Python.
# Guess before: content is a string or a list of parts, as in OpenAI's API, and both are the same
# text to the model: "USER: Say hello.", as with models that have a template. An
# assistant's content of None, which is what a message with tool calls has, is no text.
# Seen: without a template the list is written as Python prints it, and None as "None". Of an
# assistant's message with calls "ASSISTANT: None" is left, and what the tool and the
# developer say has nothing before it that tells who. The answer has status 200.
# Base models and many old ones have no template. Send strings, or give the server one
# (--chat-template).
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

# A model of random weights, with a token for each letter, so that usage counts letters.
place = Path(sys.argv[1])
place.mkdir()
letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
made = Tokenizer(models.BPE(vocab=letters, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.save(str(place / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
(place / "tokenizer_config.json").write_text(json.dumps(settings))
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=len(letters), tie_word_embeddings=True,
)
(place / "config.json").write_text(json.dumps(config))
weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
mx.save_safetensors(str(place / "model.safetensors"), weights)

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(place), "--port", str(port)]
server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=60)


def read(*messages):
    answer = client.chat.completions.create(
        model="default_model", messages=messages, max_tokens=1
    )
    return answer.usage.prompt_tokens


def compare(text, *messages):
    found = read(*messages)
    print(f"mlx-lm {version('mlx-lm')}: {found} letters, {len(text)} in {text!r}")
    assert found == len(text)


try:
    for _ in range(120):
        try:
            client.with_options(max_retries=0).models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.5)
    asked = {"role": "user", "content": "Say hello."}
    parts = [{"type": "text", "text": "Say hello."}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    compare("USER: Say hello.\nASSISTANT:", asked)
    compare(f"USER: {parts}\nASSISTANT:", {"role": "user", "content": parts})
    compare(
        "USER: Say hello.\nASSISTANT: None\nYes.\nASSISTANT:",
        asked,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "Yes."},
    )
    compare("Be brief.\nUSER: Say hello.\nASSISTANT:",
            {"role": "developer", "content": "Be brief."}, asked)
finally:
    server.terminate()
    server.wait(60)
PYTHON
done
