"""Processor time for each token: the protected server beside servers of others.

``python bench/foreign_servers.py [--rounds N] [NAME ...]``, of tests/servers/peers.py;
they must be installed (`make test-servers`). All run at once, and answer the same
requests in turns, with a tiny random model: it is the servers that are compared, not
the model. Beside each ratio is the interval in which 95 % of resampled rounds lie.
Linux: it reads ``/proc``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "servers")]

import peers  # noqa: E402
from spread import interval  # noqa: E402

from support.models import make_model  # noqa: E402
from support.server import Server  # noqa: E402

TOKENS = 300
STREAMS = 4


def seconds(pid: int) -> float:
    """Processor time of a process and its children, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    alive = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(seconds(int(child)) for child in alive)


def one_stream(server: Server, i: int) -> None:
    body = {
        "model": str(server.model),
        "messages": [{"role": "user", "content": f"tell me {i}"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    answer = server.post(body, timeout=300)
    assert answer.status == 200 and answer.broken is None, answer


def load(server: Server, streams: int, salt: int) -> float:
    """Milliseconds of processor time for a token."""
    began = seconds(server.process.pid)
    threads = [
        threading.Thread(target=one_stream, args=(server, 100 * salt + i))
        for i in range(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1e3 * (seconds(server.process.pid) - began) / (streams * TOKENS)


def compare(chosen: Sequence[peers.Peer], model: Path, work: Path, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        ours: Server = stack.enter_context(Server(model).wait_ready())
        theirs = {
            peer.name: stack.enter_context(
                peers.running(peer, "alone", model, work / peer.name)
            )
            for peer in chosen
        }
        for streams in (1, STREAMS):
            spent: dict[str, list[float]] = defaultdict(list)
            for i in range(rounds + 1):
                for name, server in {"ours": ours, **theirs}.items():
                    found = load(server, streams, i)
                    spent[name] += [found] if i else []  # the first is warm-up
            for peer in chosen:
                say(peer, streams, spent["ours"], spent[peer.name])


def say(peer: peers.Peer, streams: int, ours: list[float], theirs: list[float]) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle, low, high = interval(ratios)
    print(
        f"{peer.versions}, {streams} streams: ours {statistics.median(ours):.2f} ms a "
        f"token, theirs {statistics.median(theirs):.2f}; "
        f"x {middle:.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("names", nargs="*", default=[p.name for p in peers.PEERS])
    asked = parser.parse_args()
    chosen = [p for p in peers.PEERS if p.name in asked.names and p.is_installed]
    for name in {*asked.names} - {p.name for p in chosen}:
        print(f"did not run: {name}: it is not installed")
    with tempfile.TemporaryDirectory() as directory:
        made = make_model("../servers/tiny_qwen3.py", Path(directory) / "model")
        compare(chosen, made, Path(directory), asked.rounds)
