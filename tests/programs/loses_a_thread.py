"""A server of which a thread of its own ends with an exception, once it samples."""

import sys
import threading

from mlx_safe.cli import main
from mlx_safe.server import recorder

# Not in a line of the source, which Python 3.13 shows of a program of `-c`, too.
SAID = "-".join(("xylophone", "manatee"))

start = recorder.start_sampler


def fails():
    raise ValueError(SAID)


def started(*args):
    start(*args)
    threading.Thread(target=fails, name="a-thread").start()


recorder.start_sampler = started
sys.exit(main(["serve", *sys.argv[1:]]))
