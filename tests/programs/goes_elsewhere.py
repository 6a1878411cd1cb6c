"""DIRECTORY: dies in another directory than the one it has begun in."""

import os
import sys

os.chdir(sys.argv[1])

import mlx_safe

mlx_safe.install(signals=True)
os.chdir("/")
os.abort()
