#!/usr/bin/env bash
# mlx-lm 0.32.2 (mlx 0.32.4): a batch computes its next step while the token before is
# dealt with (`mx.async_eval` in `GenerationBatch._step`). mlx_lm.server then reads the
# log-probability of each token, whether a client asked for it or not, by
# `r.logprobs[r.token].item()`. It was computed with the token, but to pick it is new
# work for the stream that the next step has. So it waits for all of that step, and
# nothing of the server runs beside the model. It is read once for each row.
#
# One would guess: a number of an array that has been evaluated is there at once.
#
# Seen, in milliseconds (median of 40; 8 layers of 512 on two busy cores; the first three vary with
# the load):
#   a step, from one token to the next:                      27.3
#   the same, when each token's log-probability is read:     27.0
#   of it, in reading that number:                            2.7
#   after waiting for the stream, to read such a number:      0.1
#
# On the CPU that is the end of the step: MLX lets ten tasks be under way at most
# (MAX_ACTIVE_TASKS in mlx/transforms.cpp), each an operation there. On a GPU a task is a
# command buffer or a CUDA graph, so that it is all of the step.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mlx='mlx[cpu]==0.32.4'
[[ $(uname) == Darwin ]] && mlx='mlx==0.32.4'
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$mlx" 'mlx-lm==0.32.2'
"$place/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama

STEPS = 40
args = llama.ModelArgs(
    model_type="llama",
    hidden_size=512,
    num_hidden_layers=8,
    intermediate_size=1536,
    num_attention_heads=8,
    rms_norm_eps=1e-5,
    vocab_size=1000,
)
mx.random.seed(1)
model = llama.Model(args)
mx.eval(model.parameters())


def run(read, wait=False):
    """Milliseconds: of a step with what follows, and of reading the number."""
    # The server, too, gives it the stream that its thread has.
    batch = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
    batch.insert([[1, 2, 3, 4]], max_tokens=[STEPS + 20])
    steps, reads = [], []
    begin = time.perf_counter()
    while len(steps) < STEPS:
        _, answers = batch.next()
        for answer in answers:
            if wait:
                mx.synchronize()
            at = time.perf_counter()
            if read:
                answer.logprobs[answer.token].item()
            now = time.perf_counter()
            reads.append(1e3 * (now - at))
            steps.append(1e3 * (now - begin))
            begin = now
    batch.close()
    return statistics.median(steps), statistics.median(reads)


run(True)
plain, _ = run(False)
step, reading = run(True)
_, alone = run(True, wait=True)
print(f"a step, from one token to the next:                   {plain:8.1f}")
print(f"the same, when each token's log-probability is read:  {step:8.1f}")
print(f"of it, in reading that number:                        {reading:8.1f}")
print(f"after waiting for the stream, to read such a number:  {alone:8.1f}")
# It waits for what is left of the step, and takes next to nothing when that is none.
sys.exit(not reading > 5 * alone)
PYTHON
