"""The protected server, whose model is never loaded."""

import sys
import time

import mlx_lm.server

from mlx_safe.cli import main

mlx_lm.server.ModelProvider.load_default = lambda self: time.sleep(600)
sys.exit(main(["serve", *sys.argv[1:]]))
