#!/usr/bin/env bash
# mlx_lm.evaluate gives a model of random weights 100% in BLiMP.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), MLXLM of
# mlx_lm.evaluate; lm-eval 0.4.13.
# Guess before: about 50%, as of a coin. BLiMP asks which of two sentences is likelier, with
# nothing before them; lm-eval's own models put the end-of-text token there. "Implementations of
# LM must be able to handle an empty context string", says MLXLM's docstring, too.
# Seen: where the tokenizer adds no first token (GPT-2's kind: Qwen, SmolLM), every sentence
# after nothing has a log-likelihood of -inf. Of equal ones the first wins, and in BLiMP that
# is the right one. With the sentences exchanged it is 100% again. It is logged as a prefix
# that a long completion has pushed out. 0.31.3 raises NameError "all_scores".
# Tasks whose "doc_to_text" is empty (BLiMP, lm_syneval, crows_pairs) need a tokenizer that
# adds a first token.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

place = Path(sys.argv[1]) / "model"
place.mkdir()
letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
made = Tokenizer(models.BPE(vocab=letters, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.save(str(place / "tokenizer.json"))
(place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=len(letters), tie_word_embeddings=True,
)
(place / "config.json").write_text(json.dumps(config))
mx.random.seed(0)
model = llama.Model(llama.ModelArgs(**config))
weights = dict(tree_flatten(model.parameters()))
mx.save_safetensors(str(place / "model.safetensors"), weights)

GOOD = [f"{who} {does} the book." for who in ("She", "He", "Ann") for does in ("reads", "likes")]
BAD = [s.replace("s the", " the") for s in GOOD]
template = Path(lm_eval.__file__).parent / "tasks/blimp/_template_yaml"
settings = yaml.safe_load(template.read_text())


def accuracy(name, good, bad):
    file = place / f"{name}.jsonl"
    rows = [{"sentence_good": g, "sentence_bad": b} for g, b in zip(good, bad)]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = ConfigurableTask(
        config={
            **settings, "task": name, "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"train": str(file)}},
        }
    )
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    return results["results"][name]["acc,none"]


lm = MLXLM(str(place))
try:
    found = accuracy("blimp", GOOD, BAD), accuracy("exchanged", BAD, GOOD)
except NameError as e:
    found = str(e)
print(f"mlx-lm {version('mlx-lm')}: {found}")
if version("mlx-lm") == "0.31.3":
    assert "all_scores" in found
else:
    assert found == (1.0, 1.0)
PYTHON
done
