"""What mlx-lm's prompt cache and ours count of two prompts, and what they hold."""

import gc

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, LRUPromptCache

from mlx_safe.server.mlx_lm.prompt_cache import PromptCache


def held(cache):
    # Eight prompts read as one batch, as mlx-lm does; two are stored.
    mx.eval(cache_data := mx.random.normal((8, 4, 1000, 32)))
    batch = BatchKVCache([0] * 8)
    batch.update_and_fetch(cache_data, cache_data)
    mx.eval(batch.keys, batch.values)
    for i in (2, 5):
        cache.insert_cache("model", [i] * 1000, [batch.extract(i)])
    del batch, cache_data
    gc.collect()
    mx.clear_cache()
    return cache.nbytes


for kind in (LRUPromptCache, PromptCache):
    before = mx.get_active_memory()
    cache = kind(10)
    counted = held(cache)
    print(counted, mx.get_active_memory() - before)
    del cache
    gc.collect()
