"""The protected server; loads its first model, and then fails with what is said in
MLX_SAFE_TEST_FAILS, once for each line.
"""

import os
import sys

import mlx_lm.server as server

from mlx_safe.cli import main

messages = [None, *os.environ["MLX_SAFE_TEST_FAILS"].splitlines()]
read = server.load


def load(path_or_hf_repo, *args, **kwargs):
    message = messages.pop(0) if messages else None
    if message:
        raise RuntimeError(message)
    return read(path_or_hf_repo, *args, **kwargs)


server.load = load
sys.exit(main(["serve", *sys.argv[1:]]))
