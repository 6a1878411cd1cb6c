"""Starts itself again, which starts a child."""

import multiprocessing
import os
import sys


def child():
    import mlx.core  # noqa: F401

    print("spawned", "mlx_safe" in sys.modules, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        os.execv(sys.executable, [sys.executable, "-P", sys.argv[0], "again"])
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    import mlx.core  # noqa: F401

    print("executed", "mlx_safe" in sys.modules)
