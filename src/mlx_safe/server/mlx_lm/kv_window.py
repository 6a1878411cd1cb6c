"""``--max-kv-size``: a KV cache that holds the last N tokens and no more.

One mechanism for both paths and all versions of mlx-lm: every path asks the model
for its caches (`mlx_lm.models.cache.make_prompt_cache`), so the model answers.
"""

from __future__ import annotations

from mlx_lm.models.cache import KVCache, RotatingKVCache

from .protocols.models import Cache, Model

__all__ = ["limit"]

# The first tokens stay: without them a model's text falls apart (they take the
# attention that has nowhere else to go). mlx-lm's own value; its batches ignore it.
KEEP = 4


def limit(model: Model, max_kv_size: int) -> None:
    """From now on caches made for ``model`` hold at most ``max_kv_size`` tokens.

    Only those that would grow with the text: a model's own rotating and
    state-space caches stay as they are. The model keeps its class's name and stays
    an instance of it.
    """
    cls = type(model)
    if getattr(cls, "_mlx_safe_kv_window", False):
        return

    def make_cache(self: Model) -> list[Cache]:
        if hasattr(cls, "make_cache"):
            made = cls.make_cache(self)
        else:
            made = [KVCache() for _ in self.layers]
        return [
            RotatingKVCache(max_kv_size, keep=KEEP) if type(c) is KVCache else c
            for c in made
        ]

    model.__class__ = type(
        cls.__name__,
        (cls,),
        {
            "make_cache": make_cache,
            "__module__": cls.__module__,
            "_mlx_safe_kv_window": True,
        },
    )
