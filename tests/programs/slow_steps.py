"""The protected server, whose steps take ten milliseconds more."""

import sys
import time

from mlx_safe import testing
from mlx_safe.cli import main

count = testing.plans.step


def step(phase):
    time.sleep(0.01)
    count(phase)


testing.plans.step = step
sys.exit(main(["serve", *sys.argv[1:]]))
