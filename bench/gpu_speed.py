"""Jobs of `gpu.py` about speed: protected beside stock, in pairs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpu_support import ask, connect_all, head, interval, row, together

from support.server import Server
from support.usage import cpu_seconds

T = TypeVar("T")

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


def _round(server: Server, clients: int, tokens: int) -> tuple[float, ...]:
    """Tokens/s of all clients, from the first request to the last token; and of the
    median stretch of 16 tokens of one, which no hiccup of the machine changes."""
    made = connect_all(server, clients)
    begin = time.time()
    replies = together(
        clients, lambda i: ask(server, WORDS, tokens, connection=made[i])
    )
    seconds = max(reply.ended for reply in replies) - begin
    got = sum(reply.tokens for reply in replies)
    assert got >= 0.9 * clients * tokens, [reply.outcome for reply in replies]
    stretches = [
        later - earlier
        for reply in replies
        for earlier, later in zip(reply.arrivals, reply.arrivals[16:], strict=False)
    ]
    return got / seconds, clients * 16 / statistics.median(stretches)


def in_turn(
    args: argparse.Namespace,
    until: float,
    servers: dict[str, Server],
    one: Callable[[Server], T],
) -> dict[str, list[T]]:
    """What ``one`` finds at each server, pair by pair; the first round is left out.

    A B, B A, … so that neither always goes first.
    """
    found: dict[str, list[T]] = {name: [] for name in servers}
    for server in servers.values():
        one(server)
    first = next(iter(servers))
    while len(found[first]) < args.pairs and time.time() < until:
        names = list(servers)
        if len(found[first]) % 2:
            names.reverse()
        for name in names:
            found[name].append(one(servers[name]))
    return found


def _print_ratio(
    clients: int, what: str, values: dict[str, list[float]], best: Callable[..., float]
) -> None:
    """Medians, the mean of the pairs' ratios, and the ratio of the best rounds."""
    pairs = zip(values["protected"], values["stock"], strict=True)
    mean, low, high = interval([a / b for a, b in pairs])
    medians = [f"{statistics.median(values[n]):.3f}" for n in ("stock", "protected")]
    ratio = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    of_best = f"{best(values['protected']) / best(values['stock']):.3f}"
    row(clients, what, *medians, ratio, of_best, len(values["stock"]))


def _print_ratios(
    clients: int, names: Sequence[str], found: dict[str, list[tuple[float, ...]]]
) -> None:
    for i, what in enumerate(names):
        values = {server: [x[i] for x in found[server]] for server in found}
        _print_ratio(clients, what, values, min if what.startswith("CPU") else max)


def _head() -> None:
    head("clients", "", "stock", "protected", "ratio (95 %)", "of the best", "pairs")


def throughput(args: argparse.Namespace, model: Path) -> list[Any]:
    """tokens/s, protected : stock."""
    rows: list[Any] = []
    counts = args.clients or [1, 8, 32]
    tokens = args.tokens or 128
    _head()
    with both(model) as servers:
        for clients in counts:
            until = time.time() + args.seconds / len(counts)
            one = functools.partial(_round, clients=clients, tokens=tokens)
            found = in_turn(args, until, servers, one)
            _print_ratios(clients, ("tokens/s", "tokens/s, median stretch"), found)
            rows.append([clients, found])
    return rows


def cpu(args: argparse.Namespace, model: Path) -> list[Any]:
    """A model that is next to nothing, so that the server is all there is."""
    rows: list[Any] = []
    counts = args.clients or [1, 8]
    tokens = args.tokens or 200
    _head()

    with both(model) as servers:
        for clients in counts:
            until = time.time() + args.seconds / len(counts)
            one = functools.partial(_cost, clients=clients, tokens=tokens)
            found = in_turn(args, until, servers, one)
            names = ("CPU ms per token", "tokens/s", "tokens/s, median stretch")
            _print_ratios(clients, names, found)
            rows.append([clients, found])
    return rows


def _cost(server: Server, clients: int, tokens: int) -> tuple[float, ...]:
    """CPU milliseconds per token, and what `_round` finds."""
    before = cpu_seconds(server.process.pid)
    speeds = _round(server, clients, tokens)
    spent = cpu_seconds(server.process.pid) - before
    return 1e3 * spent / (clients * tokens), *speeds
