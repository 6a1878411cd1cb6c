"""What the log, the metrics and the status page cost: with and without, in pairs.

One server answers in turn with all of that and without it: then it logs, counts,
samples and notes nothing. Which of the two comes first changes with each pair. Two
processes differ by more than all of it costs, so it is one. ``--before`` is a directory
with an earlier package ``mlx_safe``, complete with its native part: a server of it
answers in turn with this one then, and is scraped in turn.

Printed: what a token, a step and a request pay for it by themselves, and lines and
bytes of the log for each request. Then CPU seconds of the process for each token, which
a busy machine disturbs less than the time. They are with by without: the median of the
pairs, and its 95 % interval by bootstrap. Last, how long ``/metrics``, ``/status.json``
and, to compare, ``/health`` take while 64 requests are in flight. Aims: at most 1.01 of
the CPU, under 5 ms.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
import timeit
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from spread import interval

from support.server import Server

IN_FLIGHT = 64
SCRAPES = 50  # of each server; two of each are asked
TOKENS = 600

# Says how much CPU it has used when it is told anything.
COUNTED = """
import os, sys, threading, time
from mlx_safe.cli import main
def switch(word):
    pass
{more}
def listen():
    for line in sys.stdin:
        word = line.strip()
        switch(word)
        os.write(1, f"{{word}}: {{time.process_time_ns()}}\\n".encode())
threading.Thread(target=listen, daemon=True).start()
sys.exit(main(["serve", *sys.argv[1:]]))
"""
# Told "with" or "without" it goes on so.
SWITCHED = """
from types import SimpleNamespace
from mlx_safe.server import exchange, metrics, recorder, step
PARTS = [
    (cls, name, getattr(cls, name))
    for cls, names in (
        (recorder.Place, ("taken", "begun", "prefilled", "produced", "ended")),
        (metrics.Metrics, ("count",)),
        (exchange.Exchange, ("log",)),
        (step.Step, ("begin", "end")),
    )
    for name in names
]
on = threading.Event()
on.set()
def nothing(*args, **kwargs):
    pass
def sleep(seconds):
    time.sleep(seconds)
    on.wait()
recorder.time = SimpleNamespace(sleep=sleep)
def switch(word):
    if word in ("with", "without"):
        on.set() if word == "with" else on.clear()
        for cls, name, own in PARTS:
            setattr(cls, name, own if on.is_set() else nothing)
"""


def cpu_s(server: Server) -> float:
    """CPU seconds of the server's process so far."""
    return server.ask("cpu") / 1e9


def ask(server: Server, streams: int, tokens: int) -> float:
    """CPU seconds for each token of so many streams at once."""
    body: dict[str, Any] = {"logit_bias": {"2": -100.0, "0": -100.0}}
    began = cpu_s(server)
    answers = server.chats(streams, max_tokens=tokens, stream=True, **body)
    assert all(a.done for a in answers), server.log
    return (cpu_s(server) - began) / (streams * tokens)


def by_itself() -> None:
    """What a token, a step and a request pay for it, in a process without others."""
    from mlx_safe import _reports
    from mlx_safe.server.exchange import Exchange
    from mlx_safe.server.live import Live
    from mlx_safe.server.logs import set_up
    from mlx_safe.server.metrics import Metrics
    from mlx_safe.server.recorder import Place, name_request
    from mlx_safe.server.request import Request
    from mlx_safe.server.scheduler import Scheduler
    from mlx_safe.server.step import Step

    scheduler: Any = Scheduler(None, 2, 1.0)  # type: ignore[arg-type]
    step = Step()
    metrics = Metrics(Live(scheduler, step, dict), lambda: 0, lambda: 1.0)
    name_request(named := Request(), "chatcmpl-1", "/v1/chat/completions")
    place = Place(named)
    place.taken()

    def a_token() -> None:
        place.produced(5)
        _reports.sample_memory()

    def a_step() -> None:
        step.begin("decode")
        step.end()

    def a_request() -> None:
        exchange = Exchange()
        exchange.requests = (named,)
        exchange.close(200, True)
        metrics.count(exchange)
        exchange.log()

    set_up("INFO", "text")
    handler: Any = logging.getLogger().handlers[0]
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        handler.setStream(nowhere)
        for name, call in (
            ("token", a_token),
            ("step", a_step),
            ("request", a_request),
        ):
            took = timeit.repeat(call, number=2000, repeat=20)
            print(f"for each {name}: {1e6 * min(took) / 2000:.2f} µs")


def log_of(server: Server, count: int) -> tuple[float, float]:
    """(lines, bytes) of the log for each of so many requests, one after another."""
    time.sleep(1)
    began = len(server.log)
    for i in range(count):
        assert server.chat(f"number {i}", max_tokens=4).status == 200
    time.sleep(1)
    text = server.log[began:]
    return text.count("\n") / count, len(text.encode()) / count


def scrape_s(server: Server) -> dict[str, list[float]]:
    """Seconds of each scrape while `IN_FLIGHT` requests are in flight, by path."""
    threads = [
        threading.Thread(target=lambda i=i: server.chat(f"x{i}", max_tokens=4000))
        for i in range(IN_FLIGHT)
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    while server.metric("mlx_safe_requests_in_flight") < IN_FLIGHT:
        time.sleep(0.1)
    took: dict[str, list[float]] = {}
    with closing(server.connect()) as kept:  # as Prometheus and browsers keep it
        for _ in range(SCRAPES):
            for path in ("/metrics", "/status.json", "/health"):
                began = time.perf_counter()
                kept.request("GET", path)
                assert kept.getresponse().read()
                took.setdefault(path, []).append(time.perf_counter() - began)
                time.sleep(0.02)
    assert server.metric("mlx_safe_requests_in_flight") >= IN_FLIGHT // 2
    server.process.kill()
    return took


def scrapes(model: Path, before: Path | None) -> dict[str, list[float]]:
    """`scrape_s` of this, and of the other in turn, each twice."""
    sources: dict[str, dict[str, str]] = {"this": {}}
    if before is not None:
        sources["other"] = {"PYTHONPATH": str(before.resolve())}
    found: dict[str, list[float]] = {}
    for name in (*sources, *reversed(sources)):
        with Server(model, env=sources[name]) as server:
            for path, seconds in scrape_s(server.wait_ready()).items():
                found.setdefault(f"{name}, {path}", []).extend(seconds)
    return found


def in_pairs(
    options: argparse.Namespace, this: Callable[[], Server], other: Callable[[], Server]
) -> None:
    """The CPU of a token, in pairs; each call makes a server ready for its part."""
    ratios = []
    for i in range(options.pairs + 1):
        found = {}
        for part in (this, other) if i % 2 else (other, this):
            found[part] = ask(part(), options.streams, TOKENS)
        if i:  # the first warms up
            ratios.append(found[this] / found[other])
    middle, low, high = interval(ratios)
    print(f"CPU for a token, this by other: {middle:.4f} ({low:.4f} to {high:.4f})")
    print("pairs:", *(f"{r:.3f}" for r in ratios), flush=True)


def compare(options: argparse.Namespace) -> None:
    """The log's lines, and the CPU, of both."""
    with Server(options.model, program=COUNTED.format(more=SWITCHED)) as server:
        server.wait_ready()
        if options.before is None:

            def switched(word: str) -> Server:
                server.ask(word)
                return server

            in_pairs(options, lambda: switched("with"), lambda: switched("without"))
            return
        path = {"PYTHONPATH": str(options.before.resolve())}
        with Server(options.model, env=path, program=COUNTED.format(more="")) as before:
            before.wait_ready()
            for name, one in (("other", before), ("this", server)):
                lines, size = log_of(one, 20)
                print(f"{name}: {lines:.1f} lines, {size:.0f} bytes a request")
            in_pairs(options, lambda: server, lambda: before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--streams", type=int, default=1)
    options = parser.parse_args()
    by_itself()
    if options.pairs:
        compare(options)
    for path, seconds in scrapes(options.model, options.before).items():
        took = sorted(seconds)
        middle, low, high = (1000 * s for s in interval(took))
        print(
            f"{path}, {IN_FLIGHT} in flight, ms: median {middle:.1f} ({low:.1f} to "
            f"{high:.1f}), of 100 the sixth slowest "
            f"{1000 * took[len(took) * 95 // 100]:.1f}, least {1000 * took[0]:.1f}"
        )


if __name__ == "__main__":
    main()
