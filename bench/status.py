"""What the status page costs: its weight, ``/status.json``, and its samples.

    python bench/status.py

A tiny model, 64 requests in flight that are held in a step, so that what is measured is
not the generation. Times are of this machine; ``cpu`` is the server's own, by
``/proc`` (Linux).
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
            with server.chatting(REQUESTS, max_tokens=200):
                try:
                    server.wait_held()
                    eventually(lambda: in_flight(server) == REQUESTS)
                    measure(server)
                finally:
                    server.go()


def in_flight(server: Server) -> int:
    return int(server.get("/status.json?history=none").json["requests"]["in_flight"])


def measure(server: Server) -> None:
    """Asks again and again, and for a while not at all."""
    for history in ("none", "short"):
        took, before = [], cpu_s(server.process.pid)
        for _ in range(ASKED):
            began = time.perf_counter()
            answer = server.get(f"/status.json?history={history}")
            took.append(1000 * (time.perf_counter() - began))
        cpu = 1000 * (cpu_s(server.process.pid) - before) / ASKED
        print(
            f"/status.json?history={history}, {in_flight(server)} in flight: median "
            f"{statistics.median(took):.1f} ms, of 100 the slowest "
            f"{statistics.quantiles(took, n=100)[-1]:.1f} ms, cpu {cpu:.1f} ms, "
            f"{len(answer.body) / 1000:.1f} kB"
        )
    before = cpu_s(server.process.pid)
    time.sleep(30)
    idle = (cpu_s(server.process.pid) - before) / 30
    print(f"cpu while nobody asks and nothing is computed: {100 * idle:.2f}%")


if __name__ == "__main__":
    main()
