"""Before a server: what `Numbers` was to look at is NaN, once its run has failed."""

import mlx.core

from mlx_safe.server import recovery

reset = recovery.Recovery._reset


def poisoned(self, *args):
    found = [r for r in self._scheduler.requests() if r.logprob is not None]
    for request in found:
        request.logprob = mlx.core.array(float("nan"))
    print("poisoned:", len(found), flush=True)
    reset(self, *args)


recovery.Recovery._reset = poisoned
