"""What a wrong request costs: every field with every bad value, on both endpoints.

Prints a table for docs/requests.md: the statuses, what happened to others, the time to
a 400 beside a running stream, and the memory of large bodies. Run it with the Python
of either pair: ``.venvs/observe/bin/python bench/bad_requests.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.bad_requests import CHAT, Case, cases  # noqa: E402
from support.server import Answer, Server  # noqa: E402

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
INNOCENT = {"text": "an innocent", "max_tokens": 300, "stream": True}
CLIENTS = 50
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="only the large bodies")
    parser.add_argument("--sweep", action="store_true", help="only the sweep")
    asked = parser.parse_args()
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as directory:
        make = ROOT / "tests" / "support" / "tiny_model.py"
        subprocess.run([sys.executable, str(make), directory], check=True)
        if not asked.memory:
            sweep(Path(directory))
        if not asked.sweep:
            memory(Path(directory))


# -- the sweep -----------------------------------------------------------------------


def sweep(model: Path) -> None:
    print("| path | requests | 400 | 200 | 5xx | deaths | innocents disturbed |")
    print("|---|---|---|---|---|---|---|")
    with Server(model).wait_ready() as server:
        for path, more in PATHS.items():
            with innocents(server) as disturbed:
                statuses = Counter(
                    answer_to(server, case, more, stream).status
                    for case in cases()
                    for stream in (False, True)
                )
            dead = int(server.process.poll() is not None)
            failed = sum(n for status, n in statuses.items() if (status or 599) >= 500)
            print(
                f"| {path} | {statuses.total()} | {statuses[400]} | {statuses[200]} "
                f"| {failed} | {dead} | {disturbed()} of {disturbed.asked()} |"
            )
            other = {s: n for s, n in statuses.items() if s not in (200, 400)}
            assert not other, other
        latency(server)
        assert "Traceback" not in server.log, server.log


def answer_to(server: Server, case: Case, more: dict[str, Any], stream: bool) -> Answer:
    return server.post(case.also(**more, stream=stream), case.path)


class Disturbed:
    """How many of an innocent's answers were not what it gets alone."""

    def __init__(self, alone: str) -> None:
        self.alone = alone
        self.answers: list[Answer] = []

    def __call__(self) -> int:
        return sum(answer.text != self.alone for answer in self.answers)

    def asked(self) -> int:
        return len(self.answers)


@contextlib.contextmanager
def innocents(server: Server) -> Iterator[Disturbed]:
    """Somebody who streams one answer after the other while the block runs."""
    found = Disturbed(server.chat(**INNOCENT).text)
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set() or not found.answers:
            found.answers.append(server.chat(**INNOCENT))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield found
    ended.set()
    thread.join(300)


def latency(server: Server) -> None:
    """From the connect to the last byte of a 400, beside a stream that runs."""
    wrong = [case for case in cases() if case.refused and len(case.body) < 10_000]
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100_000}
    times = []
    with server.stream({**ask, "stream": True}) as lines:
        next(line for line in lines if line.startswith(b"data"))
        for case in wrong:
            begun = time.perf_counter()
            assert server.post(case.body, case.path).status == 400
            times.append((time.perf_counter() - begun) * 1000)
    cuts = statistics.quantiles(times, n=100)
    print(
        f"time to a 400 beside a stream, ms: median {statistics.median(times):.1f}, "
        f"99th percentile {cuts[98]:.1f}, most {max(times):.1f} (of {len(times)})"
    )


# -- memory --------------------------------------------------------------------------


def chat_of(size: int) -> bytes:
    """A chat of ``size`` bytes, nearly all of them one text."""
    body = {"messages": [{"role": "user", "content": ""}], "max_tokens": 1}
    empty = json.dumps(body).encode()
    return empty.replace(b'""', b'"' + b"words " * ((size - len(empty)) // 6) + b'"')


def small_values(size: int) -> bytes:
    """A body of many small values, which become a hundred times as much."""
    return b'{"messages": [' + b"[]," * (size // 3) + b"[]]}"


BODIES: dict[str, Callable[[], bytes]] = {
    "32 MiB of text": lambda: chat_of(32 * MIB - 100),
    "100 MB of text": lambda: chat_of(100_000_000),
    "32 MiB of small values": lambda: small_values(32 * MIB - 100),
    "1 MiB of text": lambda: chat_of(MIB - 100),
}


def memory(model: Path) -> None:
    print(f"\n| {CLIENTS} clients at once, each | statuses | RSS before | peak RSS |")
    print("|---|---|---|---|")
    for name, make in BODIES.items():
        with Server(model).wait_ready() as server:
            server.chat()
            before, body = rss(server, "VmRSS"), make()
            statuses: Counter[int | None] = Counter()

            def send(server: Server, body: bytes, statuses: Counter[Any]) -> None:
                statuses[server.post(body, CHAT, timeout=300).status] += 1

            threads = [
                threading.Thread(target=send, args=(server, body, statuses))
                for _ in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            told = ", ".join(f"{n} x {status}" for status, n in statuses.items())
            peak = rss(server, "VmHWM")
            print(f"| {name} | {told} | {before} MB | {peak} MB |", flush=True)
            assert server.chat().status == 200


def rss(server: Server, name: str) -> int:
    """Megabytes of the server's process, of /proc/PID/status (Linux)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024 // 10**6


if __name__ == "__main__":
    main()
