"""Requests over restarts of a supervised server, as a client sees them.

openai-python with its defaults asks all the time, without streams, from several
threads, while the server is killed again and again; none of its requests may fail. And
of each restart: how long a request that came at that moment waited, against what the
start took (until the model was loaded). Aims: 0 failed, at most 1.1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Server

LIMIT_S = 300.0


def child_of(pid: int) -> int:
    """The server of a supervisor."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=", "-o", "ppid="],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    (child,) = [int(child) for child, parent in rows if int(parent) == pid]
    return child


class Asking:
    """One thread that asks, and what came of it."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        import openai

        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="-"
        )
        self._stop = stop
        self.served = 0
        self.failed: list[str] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            messages: Any = [{"role": "user", "content": "Name a ship."}]
            try:
                self._client.chat.completions.create(
                    model="default_model", messages=messages, max_tokens=8
                )
                self.served += 1
            except Exception as e:
                self.failed.append(f"{type(e).__name__}: {e}")


def restart(server: Server, seen: int) -> tuple[float, float]:
    """(seconds that a client waited, seconds until the model was loaded)."""
    os.kill(child_of(server.process.pid), signal.SIGKILL)
    begin = time.perf_counter()
    waited: list[float] = []

    def ask() -> None:
        answer = server.chat("hi", timeout=LIMIT_S, max_tokens=1)
        if answer.status == 200:
            waited.append(time.perf_counter() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    while len(re.findall(r"INFO - ready: ", server.log)) <= seen:
        time.sleep(0.005)
        if time.perf_counter() - begin > LIMIT_S:
            raise SystemExit(server.log)
    loaded = time.perf_counter() - begin
    thread.join(LIMIT_S)
    return (waited or [float("inf")])[0], loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--clients", type=int, default=3)
    args = parser.parse_args()
    stop = threading.Event()
    with Server(args.model, "--supervise").wait_ready() as server:
        alone = statistics.median(
            timed(lambda: server.chat("hi", max_tokens=1)) for _ in range(5)
        )
        clients = [Asking(server.port, stop) for _ in range(args.clients)]
        rows = []
        for i in range(args.restarts):
            before = sum(c.served for c in clients)
            waited, loaded = restart(server, i + 1)
            rows.append((waited, loaded))
            ended = sum(len(c.failed) for c in clients)
            print(
                f"restart {i + 1}: waited {waited:.2f} s, loaded after {loaded:.2f} s; "
                f"{ended} failed so far",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(TimeoutError):
                wait_for(lambda n=before: sum(c.served for c in clients) > n + 3)
        stop.set()
        for client in clients:
            client.thread.join(LIMIT_S)
    failed = [text for client in clients for text in client.failed]
    ratios = [(waited - alone) / loaded for waited, loaded in rows]
    print(
        f"{args.restarts} restarts: {sum(c.served for c in clients)} requests of "
        f"openai-python served, {len(failed)} failed. The model was there after "
        f"{statistics.median(r[1] for r in rows):.2f} s, a client waited "
        f"{statistics.median(r[0] for r in rows):.2f} s (by itself the request takes "
        f"{alone:.2f} s). Ratio without that: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )
    for text in failed:
        print(f"failed: {text}")


def timed(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def wait_for(condition: Any) -> None:
    """Raises TimeoutError when it does not come true."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


if __name__ == "__main__":
    main()
