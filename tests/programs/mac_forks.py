"""On a Mac that is emulated: what a forked child says of its hooks."""

import os

import mlx_safe

mlx_safe.install()
child = os.fork()
if child == 0:
    print(mlx_safe.install().reasons, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
