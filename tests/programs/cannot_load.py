"""MESSAGE MODEL: a server whose model cannot be loaded, with that message."""

import sys

import mlx_lm.server as server

from mlx_safe.cli import main

message, model = sys.argv[1:]


def load(self, model_path, *args, **kwargs):
    raise RuntimeError(message)


server.ModelProvider._load = load
sys.exit(main(["serve", "--model", model, "--port", "0"]))
