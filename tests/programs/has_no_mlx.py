"""A process with mlx_safe and without mlx."""

import sys

sys.modules["mlx"] = None
sys.path = [p for p in sys.path if not p.endswith("site-packages")] + [sys.argv[0]]
import os

sys.path.append(os.environ["ONLY_MLX_SAFE"])
import mlx_safe

status = mlx_safe.status()
assert status.mlx_version is None
assert any("mlx is not installed" in r for r in status.reasons), status.reasons
assert status.terminate_handler
