"""mlx-lm's classes that this server subclasses, with the types of `protocols`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .protocols.generation import CacheOrder, LRUPromptCache
    from .protocols.server import APIHandler, ResponseGenerator
else:
    from mlx_lm.server import APIHandler, LRUPromptCache, ResponseGenerator

    CacheOrder = LRUPromptCache.CacheOrder

__all__ = ["APIHandler", "CacheOrder", "LRUPromptCache", "ResponseGenerator"]
