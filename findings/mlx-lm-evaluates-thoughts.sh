#!/usr/bin/env bash
# What mlx_lm.evaluate takes for a thinking model's answer is the first line of its thoughts.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), generate_until of
# mlx_lm.evaluate; lm-eval 0.4.13, with the settings of its task triviaqa.
# Guess before: the thoughts are taken off first, then the answer is cut where the task says
# ("until": a line's end, a full stop, a comma). The code knows of both.
# Seen: 0.32.2 cuts first. The first line's end stands right after <think>, so nothing is left
# to take off: the answer is "<think>", of each question. 0.31.3 takes the thoughts off and
# forgets the cut, also where the model did not think. Here the model says "Paris.So" after
# its thoughts, and has 0% with both. Nothing is said.
# With 0.32.2 ask with --chat-template-args '{"enable_thinking": false}', or choose tasks
# without "until".
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm" 'lm-eval==0.4.13'
  HF_HOME="$work/$mlx/hub" "$work/$mlx/bin/python" - "$work/$mlx" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import mlx.core as mx
import yaml
from lm_eval.api.task import ConfigurableTask
from mlx.utils import tree_flatten
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<think>", "</think>", "<end>"]
QUESTION = "Where is the Louvre"


def make(place, words):
    """A model that says these words after a colon, whatever it is asked."""
    place.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(letters)}
    merges = []
    for word in ("Hmm", "Paris"):
        for i in range(2, len(word) + 1):
            merges.append((word[: i - 1], word[i - 1]))
            vocabulary[word[:i]] = len(vocabulary)
    for word in SPECIAL:
        vocabulary[word] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    made.add_tokens([AddedToken(w, special=False) for w in SPECIAL[:2]])
    made.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    size = 320
    config = dict(
        model_type="llama", hidden_size=size, num_hidden_layers=1, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=size,
        tie_word_embeddings=False,
    )
    end = {"eos_token_id": vocabulary["<end>"]}
    (place / "config.json").write_text(json.dumps({**config, **end}))
    weights = {
        k: mx.ones(w.shape) if w.ndim == 1 else mx.zeros(w.shape)
        for k, w in tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters())
    }
    ids = [vocabulary.get(w) for w in words]
    table = mx.zeros((size, size))
    for before, after in zip([vocabulary[":"], *ids], ids):
        table[after, before] = 1
    weights["model.embed_tokens.weight"] = mx.eye(size)
    weights["lm_head.weight"] = table
    mx.save_safetensors(str(place / "model.safetensors"), weights)
    return MLXLM(str(place), use_chat_template=False)


def accuracy(place, lm):
    file = place / "rows.jsonl"
    file.write_text(json.dumps({"question": QUESTION, "answer": {"aliases": ["Paris"]}}))
    there = Path(lm_eval.__file__).parent / "tasks/triviaqa/default.yaml"
    settings = yaml.safe_load(there.read_text())
    del settings["dataset_name"]
    files = {"train": str(file), "validation": str(file)}
    task = ConfigurableTask(
        config={
            **settings, "dataset_path": "json", "dataset_kwargs": {"data_files": files}
        }
    )
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], num_fewshot=0, bootstrap_iters=0)
    sample = results["samples"]["triviaqa"][0]
    return results["results"]["triviaqa"]["exact_match,remove_whitespace"], sample["resps"][0][0]


SAID = ["Paris", ".", "S", "o", "<end>"]
UNCUT = (0.0, "Paris.So")
old = version("mlx-lm") == "0.31.3"
for name, words, wanted in (
    ("thinks", ["<think>", "Ċ", "Hmm", "</think>", *SAID], UNCUT if old else (0.0, "<think>")),
    ("answers", SAID, UNCUT if old else (1.0, "Paris")),
):
    place = Path(sys.argv[1]) / name
    lm = make(place, words)
    found = accuracy(place, lm)
    print(f"mlx-lm {version('mlx-lm')}, a model that {name}: {found}")
    assert lm.tokenizer.has_thinking and found == wanted
PYTHON
done
