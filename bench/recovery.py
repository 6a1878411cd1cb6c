"""What a fault costs: the time until the next token, and the requests lost.

First the fixed part: how long the thread that generates is in `Recovery.recover`, and
how long a client with a prompt of a few tokens waits. Beside it the same with a
``gc.collect()`` in the reset, which is what freed the arrays until 0.1.

Then, for prompts of several lengths: the time between the token before a fault and the
token after it, as the client of a stream sees it. Next to it stands the time that
reading as many tokens takes with nothing in the prompt cache, from a new request to its
first token. That is the floor of a replay that has to read prompt and answer again;
one that finds the prompt in the prompt cache is below it.

At last the same load on `mlx-safe serve` and on the stock ``mlx_lm.server`` that a loop
starts again whenever it has ended or is not healthy. Every so many decode steps of a
process there is a fault. To the stock server it is what MLX makes of it: an abort
with 0.31.2, an exception with 0.32.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import statistics
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import CONTROLLED, NEVER, Server

ANSWER = 12  # tokens of each answer in the first part
FAULT_AT = 8  # the decode step that fails
# A timeout leaves what was complete in the prompt cache; out of memory does not.
CODES = (2, 8)
NO_END = {"2": -100.0, "0": -100.0}  # every answer is as long as the next
HEALTH_S = 0.5  # how often the loop looks after the stock server


def arrivals(server: Server, words: int, tokens: int) -> tuple[float, list[float]]:
    """(when the request was sent, when each event of the stream came), in s."""
    # Another beginning each time: nothing of it is in the prompt cache.
    messages = [
        {"role": "system", "content": f"{next(_numbers)} is your number."},
        {"role": "user", "content": "ship " * words},
    ]
    body = {"messages": messages, "stream": True}
    body.update(max_tokens=tokens, logit_bias=NO_END)
    with contextlib.closing(server._connect(300)) as connection:
        sent = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        times = [
            time.perf_counter()
            for line in connection.getresponse()
            if line.startswith(b'data: {"id"') and b'"content"' in line
        ]
    return sent, times


_numbers = itertools.count(100)


def fault(server: Server, words: int, code: int) -> tuple[float, float]:
    """(longest, median) wait between two tokens of an answer with one fault, s."""
    server.plan(f"decode:{FAULT_AT}:{code}")
    _, times = arrivals(server, words, ANSWER)
    waits = [b - a for a, b in itertools.pairwise(times)]
    return max(waits), statistics.median(waits)


def floor(server: Server, words: int) -> float:
    """From a request to its first token, with all to read, in seconds."""
    sent, times = arrivals(server, words + FAULT_AT, ANSWER)
    return times[0] - sent


def recovery(model: str, lengths: list[int], rounds: int) -> None:
    """Measures the first part and prints its table."""
    print(
        "fault | prompt words | between tokens | fault to next token | reading again "
        "| ratio"
    )
    with Server(model, program=CONTROLLED) as server:
        server.wait_ready()
        for words, code in itertools.product(lengths, CODES):
            floor(server, words)
            rows = []
            for i in range(rounds):
                # A B, B A, …: neither always goes first.
                if i % 2:
                    wait, usual = fault(server, words, code)
                    again = floor(server, words)
                else:
                    again = floor(server, words)
                    wait, usual = fault(server, words, code)
                rows.append((usual, wait, again))
            ratios = [wait / again for _, wait, again in rows]
            usual, wait, again = (
                statistics.median(column) * 1e3 for column in zip(*rows, strict=True)
            )
            print(
                f"{code:5} | {words:12} | {usual:11.0f} ms | {wait:16.0f} ms | "
                f"{again:10.0f} ms | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}), {rounds} pairs",
                flush=True,
            )


# The server says how long each recovery takes; COLLECTS as it was.
TIMED = """
import gc, os, time
from mlx_safe import _thread_state as thread_state
from mlx_safe.server import recovery
recover, restore = recovery.Recovery.recover, thread_state.ThreadState.restore
def timed(self, exc):
    begin = time.perf_counter()
    recover(self, exc)
    took_ms = 1e3 * (time.perf_counter() - begin)
    os.write(1, f"recovered in {took_ms:.3f} ms\\n".encode())
def collected(self):
    gc.collect()
    restore(self)
recovery.Recovery.recover = timed
if COLLECTS:
    thread_state.ThreadState.restore = collected
"""


def fixed(model: str, rounds: int) -> None:
    """Measures the fixed part and prints its table."""
    print("reset | in recover() | fault to next token, 2 words | faults")
    waits: dict[bool, list[float]] = {True: [], False: []}
    counter = f"any:{NEVER}"
    programs = {x: TIMED.replace("COLLECTS", str(x)) + CONTROLLED for x in waits}
    with (
        Server(model, program=programs[True], inject=counter) as before,
        Server(model, program=programs[False], inject=counter) as after,
    ):
        servers = {True: before, False: after}
        for server in servers.values():
            server.wait_ready()
            fault(server, 2, 8)
        for i in range(rounds):
            for collects in (True, False) if i % 2 else (False, True):
                waits[collects].append(fault(servers[collects], 2, 8)[0] * 1e3)
    for collects, server in servers.items():
        found = re.findall(r"recovered in ([0-9.]+) ms", server.log)
        spent = [float(ms) for ms in found][1:]
        name = "with gc.collect()" if collects else "as it is"
        print(
            f"{name:17} | {statistics.median(spent):.1f} ms ({min(spent):.1f} to "
            f"{max(spent):.1f}) | {statistics.median(waits[collects]):.0f} ms | "
            f"{len(spent)}",
            flush=True,
        )


def load(
    running: list[Server], clients: int, requests: int, tokens: int
) -> Counter[str]:
    """Each client asks ``requests`` times; counts what became of the requests.

    One that is refused asks until it is taken: that is counted, but nothing lost.
    ``running`` holds the server that runs at the moment.
    """
    outcomes: Counter[str] = Counter()

    def one(client: int) -> None:
        left = requests
        while left:
            answer = running[0].chat(
                f"{client}.{left}: tell me of a ship",
                timeout=300,
                max_tokens=tokens,
                stream=True,
                logit_bias=NO_END,
            )
            if "ConnectionRefused" in (answer.broken or ""):
                outcomes["refused"] += 1
                time.sleep(0.5)
                continue
            left -= 1
            if answer.done and not answer.error:
                outcomes["answered"] += 1
            elif answer.status == 503:
                outcomes["told to come again"] += 1
            else:
                outcomes["lost"] += 1

    threads = [threading.Thread(target=one, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return outcomes


class Restarted:
    """The stock server in a loop that starts it again."""

    def __init__(self, model: str, plan: str) -> None:
        self._start = functools.partial(Server, model, inject=plan, stock=True)
        self.running = [self._start()]
        self.running[0].wait_ready()
        self.starts = 1
        self._over = threading.Event()
        self._loop = threading.Thread(target=self._watch)
        self._loop.start()

    def _watch(self) -> None:
        while not self._over.wait(HEALTH_S):
            server = self.running[0]
            healthy = server.process.poll() is None
            with contextlib.suppress(OSError):
                healthy = healthy and server.get("/health", timeout=5).status == 200
            if not healthy:
                server.stop()
                self.running[0] = self._start()
                self.starts += 1
                with contextlib.suppress(AssertionError):
                    self.running[0].wait_ready()

    def stop(self) -> None:
        self._over.set()
        self._loop.join()
        self.running[0].stop()


def lost(model: str, every: int, clients: int, requests: int, tokens: int) -> None:
    """Measures the second part and prints its table."""
    aborts = version("mlx") < "0.32"
    steps = range(every, 100 * every, every)
    stock_plan = f"decode:{every}:2:once:{'terminate' if aborts else 'raise'}"
    kinds = ("answered", "lost", "told to come again", "refused")
    print(f"{clients} clients, {requests} requests each, a fault each {every} steps")
    print("server | " + " | ".join(kinds) + " | s | faults")
    begin = time.perf_counter()
    with Server(model, inject=",".join(f"decode:{n}:2" for n in steps)) as server:
        server.wait_ready()
        found = load([server], clients, requests, tokens)
        seconds = time.perf_counter() - begin
        faults = server.metric("mlx_safe_generation_failures_total")
    _row("mlx-safe serve", found, kinds, seconds, int(faults))
    begin = time.perf_counter()
    restarted = Restarted(model, stock_plan)
    try:
        found = load(restarted.running, clients, requests, tokens)
    finally:
        restarted.stop()
    seconds = time.perf_counter() - begin
    _row("stock, restarted", found, kinds, seconds, restarted.starts - 1)


def _row(
    name: str, found: Counter[str], kinds: tuple[str, ...], seconds: float, faults: int
) -> None:
    counts = " | ".join(f"{found[kind]:{len(kind)}}" for kind in kinds)
    print(f"{name} | {counts} | {seconds:.0f} | {faults}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--words", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--rounds", type=int, default=4)
    parts = ["fixed", "recovery", "lost"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    if "fixed" in args.parts:
        fixed(args.model, 3 * args.rounds)
    if "recovery" in args.parts:
        recovery(args.model, args.words, args.rounds)
    if "lost" in args.parts:
        lost(args.model, args.every, args.clients, args.requests, args.tokens)


if __name__ == "__main__":
    main()
