"""What this server passes on without a look into it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["Array", "Json", "ModelKey", "Processor", "Progress", "Sampler", "Uid"]

Uid = Hashable  # of a request in a batch
ModelKey = Any  # what the prompt cache knows a model by
Array = Any  # `mx.array`: MLX ships no types that mypy may follow here
Json = dict[str, Any]
Progress = Callable[[int, int], None]  # tokens of a prompt read, and all
Sampler = Callable[[Array], Array]
Processor = Callable[[Array, Array], Array]
