#!/usr/bin/env bash
# presence_penalty and frequency_penalty of mlx-lm count the prompt, and forget after 20
# tokens.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2, make_logits_processors with
# generate_step and with BatchGenerator.
# Guess before: "Corresponds to the OpenAI option with the same name", as the documentation
# of make_presence_penalty has it: all tokens of the answer count, none of the prompt.
# Seen: the last 20 tokens count, whoever said them. With a model that prefers token 5 and
# next 6, and a penalty between them, the answer to the prompt [5] begins with 6, and to
# [1] with 5. Once 5 is 20 tokens ago it is as good as new. So words of the question are
# avoided, the more the shorter it is, and a long answer repeats itself all the same.
# The server takes presence_context_size and frequency_context_size: a large number
# counts all of the answer, and of the prompt. Nothing leaves the prompt out.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import importlib
import sys

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors

generate = importlib.import_module("mlx_lm.generate")


class Model(nn.Module):
    """Whatever it reads: 5 is likeliest, then 6, then 7, and so on."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Identity()]

    def make_cache(self):
        return [KVCache()]

    def __call__(self, tokens, cache=None):
        rows, length = tokens.shape
        cache[0].update_and_fetch(*[mx.zeros((rows, 1, length, 8))] * 2)
        scores = mx.where(mx.arange(64) < 5, -1000.0, -0.01 * mx.arange(64))
        return mx.broadcast_to(scores, (rows, length, 64))


def alone(prompt, n, **penalty):
    processors = make_logits_processors(**penalty)
    steps = generate.generate_step(
        mx.array(prompt), Model(), max_tokens=n, logits_processors=processors
    )
    return [int(token) for token, _ in steps]


def batched(prompt, n, **penalty):
    generator = generate.BatchGenerator(Model())
    processors = make_logits_processors(**penalty)
    generator.insert([prompt], [n], logits_processors=[processors])
    answer = []
    while len(answer) < n:
        answer += [response.token for response in generator.next()[1]]
    return answer


for way in (alone, batched):
    for name in ("presence", "frequency"):
        penalty = {f"{name}_penalty": 1.0}
        of_five, of_one = way([5], 1, **penalty), way([1], 1, **penalty)
        long = way([1], 22, **penalty)
        wide = way([1], 22, **penalty, **{f"{name}_context_size": 1000})
        print(f"mlx-lm {sys.argv[1]}, {way.__name__}, {name}: to [5] {of_five},"
              f" to [1] {of_one}, the 22nd token {long[21]}, with 1000: {wide[21]}")
        assert (of_five, of_one) == ([6], [5])
        assert long[:21] == list(range(5, 26))
        assert long[21] == 5
        assert wide[21] == 26
PYTHON
python3 -m venv "$work/venv"
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/venv/bin/python" "$work/look.py" "${pair#*/}"
done
echo "as written: the last 20 tokens count"
