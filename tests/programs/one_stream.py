"""mlx-lm 0.31.3 serves a request with a seed on a stream of its own.

On the CPU backend that is a second thread that talks to the same sockets. With a GPU
all collectives run on the default stream of the CPU, as they do here with this.
"""

import importlib
import sys
from typing import Any

import mlx.core as mx

from mlx_safe.cli import main

generate: Any = importlib.import_module("mlx_lm.generate")
generate.generation_stream = mx.cpu
sys.exit(main(["serve", *sys.argv[1:]]))
