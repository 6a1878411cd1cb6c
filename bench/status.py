"""What is asked while work goes on: the page's weight, ``/status.json``, ``/metrics``.

    python bench/status.py

A tiny model, 64 requests in flight: first held in a step, so that what is measured is
not the generation, then generating, which holds Python's lock as well. Times are of
this machine; ``cpu`` is the server's own, by ``/proc`` (Linux). ``bare`` is what the
machine makes of it by itself: Python's ``http.server`` in a process of its own, which
sends as many bytes without computing any, and is asked in turn.
"""

from __future__ import annotations

import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.server import CONTROLLED, Server, eventually
from support.tiny_model import make

REQUESTS = 64
ASKED = 300
TOKENS = 20_000  # of an answer: none ends while it is asked
BARE = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"x" * int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
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


@contextmanager
def bare_server() -> Iterator[Callable[[int], object]]:
    """What asks it for so many bytes."""
    words = [sys.executable, "-I", "-c", BARE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        def ask(size: int) -> object:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", f"/{size}")
            body = connection.getresponse().read()
            connection.close()
            return body

        try:
            yield ask
        finally:
            process.kill()


def took_ms(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - began)


def measure(server: Server, state: str) -> None:
    """Asks for each path again and again."""
    for path in PATHS:
        size, took, bare = len(server.get(path).body), [], []
        before = cpu_s(server.process.pid)
        with bare_server() as ask_bare:
            for _ in range(ASKED):
                took.append(took_ms(lambda: server.get(path)))  # noqa: B023
                bare.append(took_ms(lambda: ask_bare(size)))  # noqa: B023
        cpu = 1000 * (cpu_s(server.process.pid) - before) / ASKED
        share = f", cpu {cpu:.1f} ms" if state == "held" else ""
        print(
            f"{path}, {in_flight(server)} {state}: {figures(took)}{share}, "
            f"{size / 1000:.1f} kB; bare: {figures(bare)}"
        )


def figures(took: list[float]) -> str:
    return (
        f"median {statistics.median(took):.1f} ms, of 100 the slowest "
        f"{statistics.quantiles(took, n=100)[-1]:.1f} ms"
    )


def idle(server: Server) -> None:
    """What the samples cost while nobody asks."""
    before = cpu_s(server.process.pid)
    time.sleep(30)
    share = (cpu_s(server.process.pid) - before) / 30
    print(f"cpu while nobody asks and nothing is computed: {100 * share:.2f}%")


if __name__ == "__main__":
    main()
