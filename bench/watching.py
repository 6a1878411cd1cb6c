"""What the log, the metrics and the status page cost: with and without, in pairs.

Both servers run at the same time on the same model and answer in turn; which of the
two comes first changes with each pair. ``--before`` is a directory with an earlier
package ``mlx_safe``, complete with its native part. Without it the other server is this
one with all of that taken out: it logs, counts, samples and notes nothing.

Printed: what a token, a step and a request pay for it by themselves; lines and bytes of
the log for each request; CPU seconds of the process for each token (with by without,
the median of the pairs and its 95 % interval by bootstrap), which a busy machine
disturbs less than the time; and how long ``/metrics``, ``/status.json`` and,
to compare, ``/health`` take while 64 requests are in flight. Aims: at most
1.01 of the CPU, under 5 ms.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import sys
import threading
import time
import timeit
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Server

IN_FLIGHT = 64
SCRAPES = 100
TOKENS = 600

WITHOUT = """
import sys
from mlx_safe.cli import main
from mlx_safe.server import exchange, metrics, recorder, step
nothing = lambda *args, **kwargs: None
recorder.start_sampler = nothing
for cls, names in (
    (recorder.Place, ("taken", "begun", "prefilled", "produced", "ended")),
    (metrics.Metrics, ("count",)),
    (exchange.Exchange, ("log",)),
    (step.Step, ("begin", "end")),
):
    for name in names:
        setattr(cls, name, nothing)
sys.exit(main(["serve", *sys.argv[1:]]))
"""


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
    return {path: sorted(seconds) for path, seconds in took.items()}


def compare(options: argparse.Namespace) -> None:
    """The log's lines, and the CPU, of both servers."""
    if options.before is None:
        other = Server(options.model, program=WITHOUT)
    else:
        path = {"PYTHONPATH": str(options.before.resolve())}
        other = Server(options.model, env=path)
    with other as before, Server(options.model) as after:
        both = (before.wait_ready(), after.wait_ready())
        for name, server in zip(("other", "this"), both, strict=True):
            lines, size = log_of(server, 20)
            print(f"{name}: {lines:.1f} lines, {size:.0f} bytes a request", flush=True)
        ratios = []
        for i in range(options.pairs + 1):
            order = both if i % 2 else both[::-1]
            found = {id(s): ask(s, options.streams, TOKENS) for s in order}
            if i:  # the first warms up
                ratios.append(found[id(after)] / found[id(before)])
        middle, low, high = interval(ratios)
        print(f"CPU for a token, this by other: {middle:.3f} ({low:.3f} to {high:.3f})")
        print("pairs:", *(f"{r:.3f}" for r in ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=4)
    options = parser.parse_args()
    by_itself()
    if options.pairs:
        compare(options)
    with Server(options.model) as server:
        for path, took in scrape_s(server.wait_ready()).items():
            print(
                f"{path}, {IN_FLIGHT} in flight, ms: median "
                f"{1000 * took[len(took) // 2]:.1f}, 95 % "
                f"{1000 * took[len(took) * 95 // 100]:.1f}, least {1000 * took[0]:.1f}"
            )
        server.process.kill()


if __name__ == "__main__":
    main()
