"""Jobs of `gpu.py` about memory that runs out in earnest."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_support import (
    Reply,
    ask,
    head,
    interval,
    outcomes,
    prompt,
    row,
    together,
    write_log,
)

from support.server import CONTROLLED, Server

# Plain memory of MLX's own, so that it works with every backend. Told "N" it holds all
# of the card but N GiB, told "free" nothing, and says when it is so.
BALLAST = """
import sys
import mlx.core as mx
gib, held = 2**30, []
for line in sys.stdin:
    held.clear()
    mx.clear_cache()
    if line.strip() != "free":
        leave = float(line) * gib
        while (free := mx.device_info()["free_memory"] - leave) > gib // 2:
            size = max(gib // 4, min(gib, int(free))) // 2**20 * 2**20
            held.append(mx.zeros((size // 2**20, 2**19), mx.float16) + 1)
            try:
                mx.eval(held[-1])
            except RuntimeError:
                held.pop()
                break
    print("done", flush=True)
"""


class Ballast:
    """Another process that holds the card's memory, as much as it is told."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", BALLAST]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)

    def tell(self, what: str) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(f"{what}\n")
        stdin.flush()
        assert stdout.readline() == "done\n"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def ballast(leave: float) -> Iterator[Ballast]:
    """It holds all of the card but ``leave`` GiB meanwhile."""
    other = Ballast()
    try:
        other.tell(str(leave))
        yield other
    finally:
        other.end()


SERVERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "stock": ([], {"stock": True}),
    "protected": ([], {"program": CONTROLLED}),
    "explicit": (["--max-active-memory-bytes", "4500M"], {"program": CONTROLLED}),
}


def out_of_memory(args: argparse.Namespace, model: Path) -> list[Any]:
    """All clients at once, each with a long prompt; then a conversation that grows."""
    rows: list[Any] = []
    words = (args.words or [5000])[0]
    tokens = args.tokens or 16
    until = time.time() + args.seconds
    names = args.only or list(SERVERS)
    head("clients", "server", "tokens answered", "s", "outcomes", "/health", "faults")
    with ballast(args.leave):
        # MLX keeps what it compiled for a shape on disk: the first server of all pays
        # for the others, so its time is not counted.
        rows.append(["warm-up", *_flood(names[-1], model, 8, words, tokens)])
        for clients in args.clients or [8]:
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(args.rounds):
                for name in reversed(names) if turn % 2 else names:
                    if time.time() > until:
                        row(clients, name, "left out: no time", "", "", "", "")
                        continue
                    if turn and name == "stock":
                        continue  # it is dead within a second, each time
                    rows.append(_flood(name, model, clients, words, tokens))
                    times[name].append(rows[-1][3])
            _ratio(clients, times)
        if time.time() < until:
            rows.append(_grow(model, until))
    return rows


def _ratio(clients: int, times: dict[str, list[float]]) -> None:
    """A learned ceiling beside an explicit one, turn by turn."""
    found = (times.get("protected", []), times.get("explicit", []))
    ratios = [a / b for a, b in zip(*found, strict=False)]
    if ratios:
        mean, low, high = interval(ratios)
        told = f"{mean:.2f} ({low:.2f} to {high:.2f}), {len(ratios)} pairs"
        row(clients, "learned : explicit", "", told, "", "", "")


def _told(server: Server) -> None:
    for line in server.log.splitlines():
        if any(word in line for word in ("room for", "fault of", "ran out", "ceiling")):
            print("   ", line[:240], flush=True)
    write_log(server.log)


def _flood(name: str, model: Path, clients: int, words: int, tokens: int) -> Any:
    arguments, options = SERVERS[name]
    with Server(model, *arguments, **options) as server:
        server.wait_ready()
        ask(server, 200, 4)
        begin = time.time()
        replies = together(clients, lambda i: ask(server, words, tokens))
        seconds = time.time() - begin
        answered = sum(reply.tokens for reply in replies)
        with contextlib.suppress(OSError):
            health: Any = server.get("/health", 5).status
        faults: Any = "-"
        if name != "stock":
            faults = int(server.metric("mlx_safe_generation_failures_total"))
        of = f"{answered} of {clients * tokens}"
        row(clients, name, of, f"{seconds:.1f}", outcomes(replies), health, faults)
        _told(server)
    return [clients, name, answered, seconds, outcomes(replies), health, faults]


def _grow(model: Path, until: float) -> Any:
    """One conversation, 4,000 tokens longer each time, until it is refused."""
    with Server(model, program=CONTROLLED) as server:
        server.wait_ready()
        words, text = 0, prompt(4000)
        replies: list[Reply] = []
        while time.time() < until and words < 400_000:
            reply = ask(server, 0, 4, text=text)
            words = len(text.split())
            replies.append(reply)
            if reply.outcome != "200":
                break
            text += " " + prompt(4000)
        # What does not fit is told so, and the others go on.
        after = ask(server, 500, 4)
        told = f"{len(replies)} turns, up to {words} tokens: {outcomes(replies)}"
        row(1, "grows", told, "", f"then {after.outcome}", "", "")
        _told(server)
        return ["grows", words, outcomes(replies), after.outcome]


def churn(args: argparse.Namespace, model: Path) -> list[Any]:
    """A ballast that comes and goes under load, for ``--seconds``."""
    clients, tokens = (args.clients or [32])[0], args.tokens or 32
    words = args.words or [200, 1000, 3000]
    found: Counter[str] = Counter()
    lock = threading.Lock()
    until = time.time() + args.seconds
    with ballast(args.leave) as other, Server(model, program=CONTROLLED) as server:
        server.wait_ready()

        def client(i: int) -> Reply:
            turn = i
            reply = Reply()
            while time.time() < until:
                turn += 1
                reply = ask(server, words[turn % len(words)], tokens)
                with lock:
                    found[reply.outcome] += 1
                    found["tokens"] += reply.tokens
            return reply

        def come_and_go() -> None:
            held, turns = True, 0
            while time.time() < until:
                time.sleep(5)
                held = not held
                other.tell(str(args.leave) if held else "free")
                turns += 1
            print("the ballast came and went", turns, "times", flush=True)

        threading.Thread(target=come_and_go, daemon=True).start()
        together(clients, client)
        faults = int(server.metric("mlx_safe_generation_failures_total"))
        head("clients", "s", "outcomes", "faults", "/health")
        health = server.get("/health").status
        row(clients, f"{args.seconds:.0f}", dict(found), faults, health)
        _told(server)
    return [clients, args.seconds, dict(found), faults, health]
