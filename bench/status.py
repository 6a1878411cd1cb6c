"""What is asked while work goes on: the page's weight, ``/status.json``, ``/metrics``.

    python bench/status.py

A tiny model, 64 requests in flight: first held in a step, so that what is measured is
not the generation, then generating, which holds Python's lock as well. Times are of
this machine; ``cpu`` is the server's own, by ``/proc`` (Linux).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.server import CONTROLLED, Server, eventually
from support.tiny_model import make

REQUESTS = 64
ASKED = 300
TOKENS = 20_000  # of an answer: none ends while it is asked
PATHS = ("/status.json?history=none", "/status.json?history=short", "/metrics")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Prints the figures, a line each."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        with Server(folder, program=CONTROLLED).wait_ready() as server:
            page = len(server.get("/status").body.encode())
            print(f"page: {page / 1000:.1f} kB")
            server.hold(100)
            with server.chatting(REQUESTS, max_tokens=TOKENS):
                try:
                    server.wait_held()
                    eventually(lambda: in_flight(server) == REQUESTS)
                    measure(server, "held")
                    idle(server)
                finally:
                    server.go()
                measure(server, "generating")
                server.process.kill()


def in_flight(server: Server) -> int:
    return int(server.get("/status.json?history=none").json["requests"]["in_flight"])


def measure(server: Server, state: str) -> None:
    """Asks for each path again and again."""
    for path in PATHS:
        took, before = [], cpu_s(server.process.pid)
        for _ in range(ASKED):
            began = time.perf_counter()
            answer = server.get(path)
            took.append(1000 * (time.perf_counter() - began))
        cpu = 1000 * (cpu_s(server.process.pid) - before) / ASKED
        share = f", cpu {cpu:.1f} ms" if state == "held" else ""
        print(
            f"{path}, {in_flight(server)} {state}: median "
            f"{statistics.median(took):.1f} ms, of 100 the slowest "
            f"{statistics.quantiles(took, n=100)[-1]:.1f} ms{share}, "
            f"{len(answer.body) / 1000:.1f} kB"
        )


def idle(server: Server) -> None:
    """What the samples cost while nobody asks."""
    before = cpu_s(server.process.pid)
    time.sleep(30)
    share = (cpu_s(server.process.pid) - before) / 30
    print(f"cpu while nobody asks and nothing is computed: {100 * share:.2f}%")


if __name__ == "__main__":
    main()
