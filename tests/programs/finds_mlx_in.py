"""DIRECTORY VERSION MODE: mlx is found there, and treated by its version."""

import sys

directory, version, mode = sys.argv[1:]
sys.path.insert(0, directory)

import mlx_safe

status = mlx_safe.status()
assert (status.mlx_version, status.mode) == (version, mode)
assert not any("mlx is not" in r for r in status.reasons), status.reasons
