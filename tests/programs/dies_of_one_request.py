"""The protected server, killed by the request that may have POISON tokens.

In a batch of BATCH; once it is a suspect, whoever else is there. Until they are so many
a token takes its time, so that all of them come in.
"""

import os
import signal
import sys
import time

from mlx_safe.cli import main
from mlx_safe.server.request import RUNNING, SUSPECT_FROM
from mlx_safe.server.scheduler import Scheduler

BATCH = int(os.environ["BATCH"])
POISON = 977
token = Scheduler.token


def token_or_death(self, request, *args):
    if request.deaths < SUSPECT_FROM and len(self.requests(*RUNNING)) < BATCH:
        time.sleep(0.02)
    elif request.max_tokens == POISON:
        os.kill(os.getpid(), signal.SIGKILL)
    return token(self, request, *args)


Scheduler.token = token_or_death
sys.exit(main(["serve", *sys.argv[1:]]))
