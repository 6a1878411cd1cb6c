"""The protected server with slow steps: the first life; the others never serve."""

import os
import sys
import time
from pathlib import Path

from mlx_safe import testing
from mlx_safe.cli import main

lived = Path(os.environ["LIVED"])
while lived.exists():
    time.sleep(0.1)
lived.touch()
count = testing.plans.step


def step(phase):
    time.sleep(0.01)
    count(phase)


testing.plans.step = step
sys.exit(main(["serve", *sys.argv[1:]]))
