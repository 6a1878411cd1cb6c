"""The protected server; it refuses for an hour, which a signal lets pass."""

import signal
import sys
import time
from types import SimpleNamespace

from mlx_safe.cli import main
from mlx_safe.server import health, recovery

recovery.REFUSE_FOR_S = 3600.0
passed = 0.0


def pass_the_hour(*_):
    global passed
    passed = 3600.0


signal.signal(signal.SIGUSR1, pass_the_hour)
health.time = SimpleNamespace(
    sleep=time.sleep, monotonic=lambda: time.monotonic() + passed
)
sys.exit(main(["serve", *sys.argv[1:]]))
