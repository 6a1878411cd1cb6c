"""The protected server on a Mac whose hooks are not in."""

import sys

from mlx_safe.cli import main
from mlx_safe.server import serve


def require():
    raise RuntimeError("faults of the GPU are not caught here: no such class")


serve.require = require  # as `mlx_safe.require` does on a Mac
sys.exit(main(["serve", *sys.argv[1:]]))
