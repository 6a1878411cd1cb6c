#!/usr/bin/env bash
# mlx 0.31.2 with mlx-lm 0.31.3: a sampler that is used in another thread than the one
# that imported mlx_lm draws every token with the same key. mx.random.seed in that
# thread changes nothing. mlx_lm.server does just that: it imports on the main thread
# and samples on its generation thread. So each sampled answer to a prompt is the same,
# with any "seed" and without.
#
# Why: mlx_lm.sample_utils compiles its samplers with `inputs=mx.random.state,
# outputs=mx.random.state` when it is imported. In mlx 0.31.2 `mx.random.state` is
# another list in each thread; the compiled function goes on reading and writing that of
# the thread that imported it. From mlx 0.32 all threads share one.
#
# One would guess: the seed sets the state that the sampler uses, so the same
# seed gives the same tokens and another seed gives others, in any thread.
#
# Seen:
#   main thread: seed 1: [81, 367, 586, 9]
#   main thread: seed 2: [835, 566, 998, 505]
#   other thread: seed 1: [81, 81, 81, 81]
#   other thread: seed 2: [81, 81, 81, 81]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mlx='mlx[cpu]==0.31.2'
[[ $(uname) == Darwin ]] && mlx='mlx==0.31.2'
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$mlx" 'mlx-lm==0.31.3'
"$place/venv/bin/python" - <<'PYTHON'
import os
import sys
import threading

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

found = {}


def draw(where):
    sampler = make_sampler(temp=1.0)
    logprobs = mx.zeros((1, 1000))
    for seed in (1, 2):
        mx.random.seed(seed)
        found[where, seed] = [sampler(logprobs).item() for _ in range(4)]
        print(f"{where} thread: seed {seed}: {found[where, seed]}", flush=True)


draw("main")
thread = threading.Thread(target=draw, args=("other",))
thread.start()
thread.join()
as_guessed = found["main", 1] != found["main", 2] and len(set(found["main", 1])) > 1
alike = len({*found["other", 1], *found["other", 2]}) == 1
sys.stdout.flush()
# Not through the interpreter's end, which is another matter.
os._exit(0 if as_guessed and alike else 1)
PYTHON
