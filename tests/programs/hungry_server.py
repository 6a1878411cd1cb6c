"""The protected server, whose model takes all of the GPU's memory in a step for as long
as the file named by HOG is there. TESTS: the directory of the tests.
"""

import contextlib
import functools
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.server as server

from mlx_safe.cli import main

sys.path.insert(0, os.environ["TESTS"])
from support.hog import hog

load = server.ModelProvider.load


def on_the_gpu():
    """Where the model runs; under emulation, where only the CPU computes, beside it."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return mx.stream(mx.gpu) if on_cpu else contextlib.nullcontext()


@functools.wraps(load)  # its parameters are looked at
def loaded(self, *args, **kwargs):
    model, tokenizer = load(self, *args, **kwargs)
    kind = type(model)
    if not getattr(kind, "hungry", False):
        call = kind.__call__

        def hungry(self, *args, **kwargs):
            if Path(os.environ["HOG"]).exists():
                with on_the_gpu():
                    mx.eval(hog())
            return call(self, *args, **kwargs)

        kind.__call__, kind.hungry = hungry, True
    return model, tokenizer


server.ModelProvider.load = loaded
sys.exit(main(["serve", *sys.argv[1:]]))
