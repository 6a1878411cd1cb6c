"""The protected server, which writes "waits" when it reads a number of an array."""

import os
import sys

import mlx.core as mx

from mlx_safe.cli import main

item = mx.array.item


def told(self):
    os.write(1, b"waits\n")
    return item(self)


mx.array.item = told
sys.exit(main(["serve", *sys.argv[1:]]))
