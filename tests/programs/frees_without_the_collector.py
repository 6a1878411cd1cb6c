"""Before a server: says after each reset how many bytes MLX's arrays have.

Python's cyclic collector frees nothing.
"""

import gc

import mlx.core

from mlx_safe.server import recovery

gc.disable()
gc.collect = lambda *_: 0
reset = recovery.Recovery._reset


def counted(self, *args):
    reset(self, *args)
    print("after the reset:", mlx.core.get_active_memory(), flush=True)


recovery.Recovery._reset = counted
