#!/usr/bin/env bash
# The last examples of a file are never trained on, and batches are not sorted by length.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), iterate_batches and
# CacheDataset of mlx_lm.tuner, as mlx_lm.lora calls them.
# Guess before: examples are sorted by length ("Sort by length", says the source), so that
# little of a batch is padding. What does not fill a batch comes in another epoch, or as a
# smaller batch.
# Seen: what is sorted by is the number of keys in a line of the file. It is 1 for {"text": …}
# whatever the text, 3 for a line that has "tools" besides "prompt" and "completion". So the
# order of the file stays, and a batch is as long as its longest. Here that is 1,862 places
# for 966 tokens. The last len % batch_size are in no batch, in no epoch: of seven examples
# in batches of two the seventh. Where some have more keys than others, those are last. It
# is the same in validation and in --test. Nothing is said.
# Sort the file by length, and fill it up to a multiple of --batch-size.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - <<'PYTHON'
import itertools
from importlib.metadata import version

from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import iterate_batches

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))


class Tokenizer:
    eos_token_id = 0

    def encode(self, text):
        return [ord(letter) for letter in text]


def batches(lines, epochs=20):
    """The texts that come together, over some epochs, and the places of one epoch."""
    dataset = CacheDataset(TextDataset(lines, Tokenizer()))
    per_epoch = len(lines) // 2
    seen, places = set(), 0
    looped = iterate_batches(dataset, batch_size=2, max_seq_length=2048, loop=True)
    for i, (batch, _) in enumerate(itertools.islice(looped, epochs * per_epoch)):
        places += batch.size if i < per_epoch else 0
        seen.add(tuple(chr(row[0]) for row in batch.tolist()))
    return sorted(seen), places


lines = [{"text": letter * n} for letter, n in zip("abcdefg", (300, 30, 290, 20, 280, 40, 270))]
found, places = batches(lines)
tokens = sum(len(line["text"]) + 1 for line in lines[:6])
print("in file order:", found, places, "places for", tokens, "tokens")
assert found == [("a", "b"), ("c", "d"), ("e", "f")]
assert (places, tokens) == (1862, 966)

by_length = sorted(lines, key=lambda line: len(line["text"]))
found, places = batches(by_length)
print("a file that is sorted:", found, places, "places")
assert found == [("d", "b"), ("e", "c"), ("f", "g")]
assert places == 1286

lines[0]["note"] = "one more key"
found, _ = batches(lines)
print("a with one more key:", found)
assert found == [("b", "c"), ("d", "e"), ("f", "g")]
PYTHON
done
echo "as written: examples are left out"
