"""What the log and the metrics cost: this server against an earlier one, in pairs.

``--before`` is a directory with the package ``mlx_safe`` as it was, complete with its
native part. Both servers run at the same time on the same model and answer in turn;
which of the two comes first changes with each pair.

Printed: lines and bytes of the log for each request; CPU seconds of the process for
each token (after by before, the median of the pairs and its 95 % interval by
bootstrap), which a busy machine disturbs less than the time; and how long ``/metrics``
takes while 64 requests are in flight. Aims: at most 1.01 of the CPU, under 5 ms.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Server

IN_FLIGHT = 64
SCRAPES = 100
TOKENS = 200


def cpu_s(server: Server) -> float:
    """User and system time of the server's process; Linux only."""
    text = Path(f"/proc/{server.process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(server: Server, streams: int, tokens: int) -> float:
    """CPU seconds for each token of so many streams at once."""
    body: dict[str, Any] = {"logit_bias": {"2": -100.0, "0": -100.0}}
    began = cpu_s(server)
    answers = server.chats(streams, max_tokens=tokens, stream=True, **body)
    assert all(a.done for a in answers), server.log
    return (cpu_s(server) - began) / (streams * tokens)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper)."""
    draw = random.Random(1)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000)
    )
    return statistics.median(ratios), medians[50], medians[-51]


def log_of(server: Server, count: int) -> tuple[float, float]:
    """(lines, bytes) of the log for each of so many requests, one after another."""
    time.sleep(1)
    began = len(server.log)
    for i in range(count):
        assert server.chat(f"number {i}", max_tokens=4).status == 200
    time.sleep(1)
    text = server.log[began:]
    return text.count("\n") / count, len(text.encode()) / count


def scrape_s(server: Server) -> list[float]:
    """Seconds of each scrape while `IN_FLIGHT` requests are in flight."""
    threads = [
        threading.Thread(target=lambda i=i: server.chat(f"x{i}", max_tokens=4000))
        for i in range(IN_FLIGHT)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    while server.metric("mlx_safe_requests_in_flight") < IN_FLIGHT:
        time.sleep(0.1)
    took = []
    for _ in range(SCRAPES):
        began = time.perf_counter()
        server.get("/metrics")
        took.append(time.perf_counter() - began)
        time.sleep(0.02)
    assert server.metric("mlx_safe_requests_in_flight") >= IN_FLIGHT // 2
    return sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=4)
    options = parser.parse_args()
    path = {"PYTHONPATH": str(options.before.resolve())}
    with Server(options.model, env=path) as before, Server(options.model) as after:
        both = (before.wait_ready(), after.wait_ready())
        for name, server in zip(("before", "after"), both, strict=True):
            lines, size = log_of(server, 20)
            print(f"{name}: {lines:.1f} lines, {size:.0f} bytes a request", flush=True)
        ratios = []
        for i in range(options.pairs + 1):
            order = both if i % 2 else both[::-1]
            found = {id(s): ask(s, options.streams, TOKENS) for s in order}
            if i:  # the first warms up
                ratios.append(found[id(after)] / found[id(before)])
        middle, low, high = interval(ratios)
        print(
            f"CPU for a token, after by before: {middle:.3f} ({low:.3f} to {high:.3f})"
        )
        print("pairs:", *(f"{r:.3f}" for r in ratios), flush=True)
    with Server(options.model) as server:
        took = scrape_s(server.wait_ready())
        print(
            f"/metrics, {IN_FLIGHT} in flight: median {took[len(took) // 2]:.4f} s, "
            f"95 % {took[len(took) * 95 // 100]:.4f} s, least {took[0]:.4f} s"
        )
        server.process.kill()


if __name__ == "__main__":
    main()
