"""What this server passes on without a look into it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

__all__ = [
    "Array",
    "Item",
    "Json",
    "ModelKey",
    "Processor",
    "Progress",
    "Sampler",
    "State",
    "Stops",
    "Tokenized",
    "Uid",
]

Uid = Hashable  # of a request in a batch
ModelKey = Any  # what the prompt cache knows a model by
Array = Any  # `mx.array`: MLX ships no types that mypy may follow here
Json = dict[str, Any]
# What the generation thread puts into a request's queue: a `GenerationContext`, then
# any number of (done, total) of the prompt and `Response`, then None or an exception.
Item = Any
# What `_tokenize` returns: the prompt, its segments, and more in 0.32.
Tokenized = tuple[Any, ...]
# What `_make_state_machine` returns: the stop words, and more in 0.31.
Stops = tuple[Any, ...]
State = Any  # of a stop word's or a text's machine
Progress = Callable[[int, int], None]  # tokens of a prompt read, and all
Sampler = Callable[[Array], Array]
Processor = Callable[[Array, Array], Array]
