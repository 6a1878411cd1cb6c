"""The protected server, which waits long for its clients and says so."""

import sys
import time
from types import SimpleNamespace

from mlx_safe.cli import main
from mlx_safe.server import health


def sleep(seconds):
    print("it waits for its clients", flush=True)
    time.sleep(seconds)


health.ANSWER_TIMEOUT_S = 600.0
health.time = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
sys.exit(main(["serve", *sys.argv[1:]]))
