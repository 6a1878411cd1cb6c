"""The protected server on a card of CARD bytes, or as if: MLX computes on the CPU.

What a step takes is looked at when it has been made. One that took more than there
is ends as on a card, where MLX (0.32.4 with CUDA) raises from ``mx.eval`` and
``mx.async_eval``. Besides its arrays a step takes HIDDEN times as much again, which
nothing counts, as do fragments of memory and what libraries take. What MLX has freed is
its pool's until that is given back; above the memory limit it gives back what it can.
The file named by BALLAST, if it is there, says how many of the bytes another program
has. A line "step: R x N" tells that a call of the model reads N tokens of R rows.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.server as server

from mlx_safe import testing
from mlx_safe.cli import main
from mlx_safe.memory import machine
from mlx_safe.server import limits as limits_of_server

limits: Any = limits_of_server
CARD, TOTAL, OUT_OF_MEMORY = int(os.environ["CARD"]), 10**12, 2
HIDDEN = float(os.environ.get("HIDDEN", "0"))
limit = 2**63  # of MLX's memory
seen = reserved = 0  # the peak as it is asked for; with MLX's pool
peak, reset, info, look = (
    *(mx.get_peak_memory, mx.reset_peak_memory, machine._device_info, machine.usage),
)


def card():
    ballast = Path(os.environ.get("BALLAST", "/nonexistent"))
    return CARD - (int(ballast.read_text()) if ballast.exists() else 0)


def note():
    global seen, reserved
    most = max(peak(), mx.get_active_memory())
    seen, reserved = max(seen, most), max(min(reserved, limit), most)
    reset()


def get_peak():
    note()
    return seen


def reset_peak():
    global seen
    note()
    seen = 0


def set_limit(size):
    global limit
    size, limit = limit, size
    return size


def clear():
    global reserved
    note()
    reserved = mx.get_active_memory()


def small(evaluate):
    @functools.wraps(evaluate)
    def call(*args):
        note()
        before = mx.get_active_memory()
        evaluate(*args)
        mx.synchronize()
        most = max(peak(), mx.get_active_memory())
        note()
        active = mx.get_active_memory()
        if reserved + HIDDEN * (most - max(before, active)) > card():
            raise RuntimeError(testing.cuda_message(OUT_OF_MEMORY))

    return call


def free():
    note()
    return max(0, card() - reserved)


def usage():
    pool = reserved - mx.get_active_memory()
    return machine.Usage(**vars(look()) | {"pool": pool, "card_free": free()})


mx.eval, mx.async_eval = small(mx.eval), small(mx.async_eval)
mx.get_peak_memory, mx.reset_peak_memory, mx.clear_cache = get_peak, reset_peak, clear
mx.set_memory_limit = set_limit
mx.get_cache_memory = lambda: reserved - mx.get_active_memory()
limits.usage = usage
limits.read_machine = lambda: machine.read_machine(
    device_info=lambda: info() | {"total_memory": TOTAL, "free_memory": free()}
)
load = server.ModelProvider.load


@functools.wraps(load)  # its parameters are looked at
def loaded(self, *args, **kwargs):
    model, tokenizer = load(self, *args, **kwargs)
    kind = type(model)
    if not hasattr(kind, "told"):
        call = kind.__call__

        def told(self, tokens, *args, **kwargs):
            if tokens.shape[1] > 1:
                os.write(1, f"step: {tokens.shape[0]} x {tokens.shape[1]}\n".encode())
            return call(self, tokens, *args, **kwargs)

        kind.__call__, kind.told = told, True
    return model, tokenizer


server.ModelProvider.load = loaded
sys.exit(main(["serve", *sys.argv[1:]]))
