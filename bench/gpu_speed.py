"""Jobs of `gpu.py` about speed: protected beside stock, in pairs."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_support import ask, head, interval, row, together

from support.server import Server

WORDS = 20  # of each prompt
STOCK = "import mlx_lm.server as server; server.main()"
PROTECTED = """
import sys
from mlx_safe.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@contextlib.contextmanager
def both(model: Path) -> Iterator[dict[str, Server]]:
    """A stock and a protected server; nothing is injected into either."""
    with (
        Server(model, program=STOCK, env={"MLX_SAFE_AUTOINSTALL": "0"}) as stock,
        Server(model, program=PROTECTED) as protected,
    ):
        servers = {"stock": stock, "protected": protected}
        for server in servers.values():
            server.wait_ready()
        yield servers


def _round(server: Server, clients: int, tokens: int) -> float:
    """Tokens/s of all clients, from the first request to the last token."""
    begin = time.time()
    replies = together(clients, lambda i: ask(server, WORDS, tokens))
    seconds = max(reply.ended for reply in replies) - begin
    got = sum(reply.tokens for reply in replies)
    assert got >= 0.9 * clients * tokens, [reply.outcome for reply in replies]
    return got / seconds


def throughput(args: argparse.Namespace, model: Path) -> list[Any]:
    """tokens/s, protected : stock; A B, B A, … so that neither always goes first."""
    rows: list[Any] = []
    counts = args.clients or [1, 8, 32]
    tokens = args.tokens or 128
    head("clients", "stock", "protected", "ratio (95 %)", "pairs")
    with both(model) as servers:
        for clients in counts:
            until = time.time() + args.seconds / len(counts)
            speeds: dict[str, list[float]] = {name: [] for name in servers}
            for server in servers.values():
                _round(server, clients, tokens)
            while len(speeds["stock"]) < args.pairs and time.time() < until:
                names = list(servers)
                if len(speeds["stock"]) % 2:
                    names.reverse()
                for name in names:
                    speeds[name].append(_round(servers[name], clients, tokens))
            _print_speeds(clients, speeds)
            rows.append([clients, speeds])
    return rows


def _print_speeds(clients: int, speeds: dict[str, list[float]]) -> None:
    pairs = zip(speeds["protected"], speeds["stock"], strict=True)
    mean, low, high = interval([a / b for a, b in pairs])
    medians = [f"{statistics.median(speeds[n]):.1f}" for n in ("stock", "protected")]
    ratio = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    row(clients, *medians, ratio, len(speeds["stock"]))


def cpu(args: argparse.Namespace, model: Path) -> list[Any]:
    """One stream of a model that is next to nothing: the server is all there is."""
    tokens = args.tokens or 400
    until = time.time() + args.seconds
    found: dict[str, list[tuple[float, float]]] = {"stock": [], "protected": []}
    with both(model) as servers:
        for server in servers.values():
            ask(server, WORDS, tokens)
        while len(found["stock"]) < args.pairs and time.time() < until:
            names = list(servers)
            if len(found["stock"]) % 2:
                names.reverse()
            for name in names:
                server = servers[name]
                before = _cpu_seconds(server.process.pid)
                reply = ask(server, WORDS, tokens)
                spent = _cpu_seconds(server.process.pid) - before
                speed = (reply.tokens - 1) / (reply.arrivals[-1] - reply.arrivals[0])
                found[name].append((1e3 * spent / tokens, speed))
    head("", "stock", "protected", "ratio (95 %)", "pairs")
    for i, what in enumerate(("CPU ms per token", "tokens/s")):
        values = {name: [pair[i] for pair in pairs] for name, pairs in found.items()}
        ratios = zip(values["protected"], values["stock"], strict=True)
        mean, low, high = interval([a / b for a, b in ratios])
        medians = [f"{statistics.median(v):.3f}" for v in values.values()]
        ratio = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        row(what, *medians, ratio, len(values["stock"]))
    return [found]


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads."""
    if sys.platform != "linux":
        sys.exit("bench/gpu.py cpu: reads /proc, which is Linux's")
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
