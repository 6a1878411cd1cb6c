"""The protected server with a model that takes 2 ms for each token of a prompt.

It says how many tokens each step has: all rows together. `testing.attach` gets the
model where faults are planned (MLX_SAFE_INJECT). Of several ranks the second is slow.
For them all runs on one stream, as in `one_stream`.
"""

import importlib
import os
import sys
import time

import mlx.core as mx

from mlx_safe import testing
from mlx_safe.cli import main

TOKEN_S = 0.002 if os.environ.get("MLX_RANK") != "0" else 0.0
if "MLX_RANK" in os.environ:
    importlib.import_module("mlx_lm.generate").generation_stream = mx.cpu
attach = testing.attach


def attach_slowly(model, **options):
    if getattr(type(model), "is_slow", False):  # for each request
        return model
    attach(model, **options)
    cls = type(model)
    call = cls.__call__

    def slow(self, tokens, *args, **kwargs):
        if tokens.shape[-1] > 1:
            sys.stdout.write(f"step of {tokens.size}\n")
            sys.stdout.flush()
            time.sleep(TOKEN_S * tokens.size)
        return call(self, tokens, *args, **kwargs)

    cls.__call__, cls.is_slow = slow, True
    return model


testing.attach = attach_slowly
sys.exit(main(["serve", *sys.argv[1:]]))
