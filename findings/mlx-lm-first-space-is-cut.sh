#!/usr/bin/env bash
# The first space of an answer is cut: text completions run into their prompt, and code
# loses one column of its first line.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2, the streaming
# detokenizer of byte-level vocabularies (GPT-2's kind: Llama 3, Qwen, SmolLM).
# Guess before: the streamed text is that of tokenizer.decode, as the base class promises.
# Seen:  ' Paris' is streamed as 'Paris', '    return x' as '   return x', ' ' as ''.
# `BPEStreamingDetokenizer._maybe_trim_space` is for SentencePiece's made-up first space,
# which a byte-level vocabulary does not have. mlx_lm.server sends that text from
# /v1/completions too, where OpenAI's API has " Paris" after "The capital of France is".
# A client that appends a completion to its prompt has to know what the server did, and
# cannot: the answer "Paris" may have been " Paris" or "Paris".
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'

"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A byte-level vocabulary: every byte, a run of four spaces, and " P".
vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "P")]
for merge in merges:
    vocabulary["".join(merge)] = len(vocabulary)
made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
made.decoder = decoders.ByteLevel()
directory = Path(sys.argv[1])
made.save(str(directory / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
(directory / "tokenizer_config.json").write_text(json.dumps(config))

tokenizer = load(directory)


def streamed(text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    detokenizer, found = tokenizer.detokenizer, ""
    for token in tokens:
        detokenizer.add_token(token)
        found += detokenizer.last_segment
    detokenizer.finalize()
    found += detokenizer.last_segment
    print(f"{text!r} is streamed as {found!r}")
    return found


assert streamed("Paris") == "Paris"
assert streamed(" Paris") == "Paris"
assert streamed("    return x") == "   return x"
assert streamed("\n    return x") == "\n    return x"
assert streamed(" ") == ""
PYTHON
