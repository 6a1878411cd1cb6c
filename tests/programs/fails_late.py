"""The protected server, where the second load of a model fails after it was read."""

import sys
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_safe.cli import main
from mlx_safe.server.mlx_lm import model_loading

evaluate, failures = mx.eval, [False, True]


def fail(*arrays):
    if failures and failures.pop(0):
        raise ValueError("a file cannot be read")
    evaluate(*arrays)


loading: Any = model_loading
loading.mx = SimpleNamespace(eval=fail, clear_cache=mx.clear_cache)
sys.exit(main(["serve", *sys.argv[1:]]))
