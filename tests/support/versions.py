"""The versions of MLX and mlx-lm that are tested: requirements/versions.mk, read."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    *("EXECUTED", "MIXED_PAIR", "NEWEST_PAIR", "OLDEST_PAIR", "PAIRS", "READ"),
    "TOO_NEW_MLX_LM",
]

_FILE = Path(__file__).parents[2] / "requirements" / "versions.mk"
_FOUND = dict(re.findall(r"^(\w+) := (.+)$", _FILE.read_text(), re.MULTILINE))

# (mlx, mlx-lm)
OLDEST_PAIR = (_FOUND["INTERCEPT_MLX"], _FOUND["INTERCEPT_MLX_LM"])
NEWEST_PAIR = (_FOUND["OBSERVE_MLX"], _FOUND["OBSERVE_MLX_LM"])
# What most servers of others run on; `make test-mixed`.
MIXED_PAIR = (NEWEST_PAIR[0], OLDEST_PAIR[1])
# mlx-lm by mlx
PAIRS = dict([OLDEST_PAIR, NEWEST_PAIR])
EXECUTED = tuple(_FOUND["EXECUTED_MLX"].split())
READ = tuple(_FOUND["READ_MLX"].split())
TOO_NEW_MLX_LM = _FOUND["TOO_NEW_MLX_LM"]
