"""One of several processes that read and write one directory of KV caches."""

import random
import sys
from pathlib import Path

from mlx_safe.kv.store import Limits
from support.kv_files import drafts, opened, restored

store = opened(Path(sys.argv[1]), Limits(6 * 4096, free=0))
chance = random.Random(int(sys.argv[2]))
for _ in range(150):
    tokens = [w for _ in range(3) for w in [chance.randrange(3)] * 256]
    if chance.random() < 0.5:
        for draft in drafts(tokens, snapshot=True):
            store.publish(draft)
    else:
        restored(store, tokens, states=chance.random() < 0.5)
assert store.off is None, store.off
assert not store.events["damaged"]
