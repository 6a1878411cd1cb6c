#!/usr/bin/env bash
# Where a question ends with a space, mlx_lm.evaluate does not count the answer's first word.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), MLXLM.loglikelihood of
# mlx_lm.evaluate; lm-eval 0.4.13, a task of one's own.
# Guess before: the log-likelihood of the answer, all of it. lm-eval's own models move a last
# space of the question to the answer, for that.
# Seen: the question's tokens are counted, and as many are taken off the front of question and
# answer together. A space alone is a token, but " yes" is one, too, so "yes" goes as part of
# the question. "yes it is" and "no it is" have the same likelihood, that of " it is" behind a
# space, and the first answer of a task always wins. With answers of one word it is
# IndexError "tuple index out of range".
# End "doc_to_text" without a space, and leave "target_delimiter" as it is (" ").
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
from lm_eval.api.task import ConfigurableTask
from mlx.utils import tree_flatten
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A byte-level vocabulary as GPT-2's, with words that have their space before them.
place = Path(sys.argv[1]) / "model"
place.mkdir()
vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
merges = []
for word in ("Ġyes", "Ġno", "Ġit", "Ġis", "Ġwas"):
    for i in range(2, len(word) + 1):
        if word[:i] not in vocabulary:
            merges.append((word[: i - 1], word[i - 1]))
            vocabulary[word[:i]] = len(vocabulary)
made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.save(str(place / "tokenizer.json"))
(place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=len(vocabulary), tie_word_embeddings=True,
)
(place / "config.json").write_text(json.dumps(config))
mx.random.seed(0)
weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
mx.save_safetensors(str(place / "model.safetensors"), weights)
lm = MLXLM(str(place))


def ask(question, between, answers):
    """What lm-eval hears of each answer to one question."""
    file = place / "rows.jsonl"
    file.write_text(json.dumps({"question": question, "answers": answers}))
    task = ConfigurableTask(
        config={
            "task": "own", "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test",
            "doc_to_text": question, "doc_to_choice": "answers", "doc_to_target": 0,
            "target_delimiter": between, "metric_list": [{"metric": "acc"}],
        }
    )
    try:
        results = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
        found = [round(r[0][0], 3) for r in results["samples"]["own"][0]["resps"]]
    except IndexError as e:
        found = str(e)
    print(f"mlx-lm {version('mlx-lm')}, {question!r} {between!r} {answers}: {found}")
    return found


yes, no = ask("Is it?", " ", ["yes it is", "no it is"])
assert yes != no
yes, no = ask("Is it? ", "", ["yes it is", "no it is"])
assert yes == no
assert ask("Is it? ", "", ["yes", "no"]) == "tuple index out of range"
PYTHON
done
