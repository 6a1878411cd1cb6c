"""The protected server, told by lines of its standard input.

A fault plan counts steps from when it is read and takes the place of the one before.
"memory" asks for the bytes of MLX's arrays, "pid" for the server's. Numbers: "steps" so
far, "clients" are handlers whose request is in the generator's hands, and "connections"
those accepted so far.
"forget" empties the prompt cache, and answers how many prompts were in it. "hold N":
the Nth step from now waits, before anything of it is done, for "go"; "hold" asks how
many it is away. A request with the stop word "FAILS" fails as mlx-lm starts it.
KV_WAIT_S in the environment: how long a snapshot of the KV tier waits for the next one.
KV_PAYS=1: what could be kept is, also where reading is quicker, as of so small a model
on a card.
"""

import gc
import os
import socket
import sys
import threading

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from mlx_safe import testing
from mlx_safe.cli import main
from mlx_safe.server import replay
from mlx_safe.server.mlx_lm import kv_capture, kv_restore
from mlx_safe.server.stop_words import StopsAtWords

NEVER = 10**9  # a step that no test comes to


class FailingStops(StopsAtWords):
    def __init__(self, stops, words):
        if "FAILS" in words:
            raise ValueError("asked for")
        super().__init__(stops, words)


vars(replay)["StopsAtWords"] = FailingStops
vars(kv_capture)["WAIT_S"] = float(os.environ.get("KV_WAIT_S", kv_capture.WAIT_S))
if os.environ.get("KV_PAYS") == "1":
    for question in ("_pays", "_is_cheaper"):
        setattr(kv_restore.Restore, question, lambda *_: True)


def forget():
    caches = [o for o in gc.get_objects() if issubclass(type(o), LRUPromptCache)]
    count = sum(len(cache) for cache in caches)
    for cache in caches:
        # The tier may be used by the generation thread only.
        disk, cache.disk = getattr(cache, "disk", None), None
        cache.trim_to(n_sequences=0)
        cache.disk = disk
    return count


testing.attach_all()
counter = testing.inject("any", NEVER)
count, going, away = testing.plans.step, threading.Event(), NEVER


def step(phase):
    global away
    if away == 1:
        going.clear()
        away = 0
        going.wait()
        if away == 0:
            away = NEVER
    elif away < NEVER:
        away -= 1
    count(phase)


testing.plans.step = step
connections, accept = 0, socket.socket.accept


def accepted(self):
    global connections
    found = accept(self)
    connections += 1
    return found


socket.socket.accept = accepted


def functions(frame):
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def clients():
    stacks = [set(functions(f)) for f in sys._current_frames().values()]
    # mlx-lm waits for the first word in the one, for the others in the other.
    return sum({"answer", "generate"} <= s or "_inner" in s for s in stacks)


QUESTIONS = {
    "memory": mx.get_active_memory,
    "steps": lambda: counter.seen,
    "clients": clients,
    "connections": lambda: connections,
    "pid": os.getpid,
    "forget": forget,
    "hold": lambda: away,
}


def listen():
    global away
    planned: list[testing.Injection] = []
    for line in sys.stdin:
        word = line.rstrip("\n")
        if word in QUESTIONS:
            answer = f"{word}: {QUESTIONS[word]()}\n"
        elif line.startswith("hold "):
            away = int(line.split()[1])
            answer = f"holds: {line}"
        elif line == "go\n":
            going.set()
            continue
        else:
            for plan in planned:
                plan.cancel()
            planned = [testing.inject(**p) for p in testing.parse_plan(line)]
            answer = f"planned: {line}"
        # One write, or the log of another thread gets in between.
        os.write(1, answer.encode())


threading.Thread(target=listen, daemon=True).start()
sys.exit(main(["serve", *sys.argv[1:]]))
