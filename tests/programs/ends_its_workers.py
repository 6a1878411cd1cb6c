"""METHOD: multiprocessing starts a worker in that way, which ends."""

import multiprocessing
import os
import sys
from typing import Any


def work():
    import mlx_safe  # noqa: F401

    directory = os.environ["MLX_SAFE_REPORT_DIR"]
    assert os.listdir(directory) == [f"run-{os.getpid()}.json"]


if __name__ == "__main__":
    context: Any = multiprocessing.get_context(sys.argv[1])
    worker = context.Process(target=work)
    worker.start()
    worker.join()
    raise SystemExit(worker.exitcode)
