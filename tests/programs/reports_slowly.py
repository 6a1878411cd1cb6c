"""The protected server, which takes a second for a report and says when it begins."""

import sys
import time

from mlx_safe import _reports
from mlx_safe.cli import main

stacks = _reports._python_stacks


def slowly(directory):
    print("a report is being written", flush=True)
    time.sleep(1)
    return stacks(directory)


_reports._python_stacks = slowly
sys.exit(main(["serve", *sys.argv[1:]]))
