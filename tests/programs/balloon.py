"""The protected server, with somebody who takes MLX's memory.

It takes the first two requests together; when both have begun to answer, memory is
taken until one of them had to be put back for it.
"""

import sys
import time
from typing import Any

import mlx.core as mx

from mlx_safe.cli import main
from mlx_safe.server.generator import ProtectedResponseGenerator as Generator
from mlx_safe.server.request import RUNNING
from mlx_safe.server.scheduler import Scheduler

came: list[bool] = []
held: list[mx.array] = []
take, step, preempt = Generator._next_request, Scheduler.step, Scheduler._preempt


def take_both(self, timeout=None):
    while not came and self.requests.qsize() < 2:
        time.sleep(0.01)
    came.append(True)
    return take(self, timeout)


def inflate(self):
    answering = [r for r in self.requests(*RUNNING) if len(r.produced) > 20]
    if len(answering) == 2 and not self.events["preempted"]:
        # Until there is room for the next block of one request and not of two. From
        # a buffer: nothing is computed for it.
        size = 100_000 if held else 4_000_000
        block: Any = memoryview(bytearray(size))
        held.append(mx.array(block))
    return step(self)


def preempt_and_let_go(self, request):
    preempt(self, request)
    held.clear()
    mx.clear_cache()


Generator._next_request = take_both
Scheduler.step, Scheduler._preempt = inflate, preempt_and_let_go
sys.exit(main(["serve", *sys.argv[1:]]))
