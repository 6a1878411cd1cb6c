"""Runs a program that has a SIGHUP while it is started."""

import os
import signal
import subprocess
import sys

from mlx_safe.running import restarts

start = subprocess.Popen


def start_and_hang_up(*args, **kwargs):
    child = start(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGHUP)
    return child


subprocess.Popen = start_and_hang_up
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(restarts.Restarts(["/bin/sleep", "300"], os.environ, None).run())
