"""DIRECTORY: mlx_safe is imported beside an mlx that cannot be."""

import os
import sys

sys.path = [p for p in sys.path if not p.endswith("site-packages")]
sys.path += [os.environ["ONLY_MLX_SAFE"], sys.argv[1]]

import mlx_safe

reasons = mlx_safe.status().reasons
assert any("mlx cannot be imported (no " in r for r in reasons), reasons
