"""The protected server, which loads its model when it reads a line."""

import sys

import mlx_lm.server as server

load = server.ModelProvider.load_default


def slowly(self):
    sys.stdin.readline()
    load(self)


server.ModelProvider.load_default = slowly
from mlx_safe.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
