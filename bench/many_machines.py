"""Two supervised servers behind a proxy: what clients see while one of them fails.

``.venvs/observe/bin/python bench/many_machines.py [--requests 1000]``, with HAProxy and
nginx installed. Every 20th or so request meets a fault of the GPU, and each minute the
process of one server is killed by SIGKILL. The proxies have the settings of
`docs/clients.md`. Prints, by proxy: answers that were right, wrong, errors, and streams
that were cut; a stream of which something has come cannot go to another server.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "clients" / "drivers")]

from soak import undisturbed  # noqa: E402

from clients.proxy import PROXIES, Proxy  # noqa: E402
from support.server import Server  # noqa: E402

CLIENTS = 4
# A request of the load has about 20 steps; a process lives for some hundred requests.
STEPS_PER_FAULT = 400
PLAN = ",".join(f"any:{STEPS_PER_FAULT * i}:{8 if i % 2 else 2}" for i in range(1, 60))


def ask(
    proxy: Proxy,
    texts: list[tuple[dict[str, Any], str]],
    numbers: itertools.count[int],
    count: int,
    seen: Counter[str],
) -> None:
    while (number := next(numbers)) < count:
        body, expected = texts[number % len(texts)]
        stream = number % 2 == 1
        answer = proxy.post({**body, "stream": stream})
        if answer.broken or (stream and answer.status == 200 and not answer.done):
            cut = "a stream that was cut" if answer.status == 200 else "no answer"
            seen[cut] += 1
        elif answer.status != 200 or answer.error:
            seen[f"{answer.status} {answer.error}"] += 1
        else:
            seen["right" if answer.text == expected else "WRONG"] += 1


def kill_each_minute(
    servers: list[Server], every_s: float, stop: threading.Event
) -> int:
    kills = 0
    for server in itertools.cycle(servers):
        if stop.wait(every_s):
            return kills
        for pid in server.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
    raise AssertionError


def run(name: str, model: Path, count: int, every_s: float, directory: Path) -> None:
    texts = undisturbed(model, 1)
    env = {"MLX_SAFE_DIR": str(directory)}
    with (
        Server(model, "--supervise", inject=PLAN, env=env) as one,
        Server(model, "--supervise", inject=PLAN, env=env) as two,
    ):
        servers = [one.wait_ready(), two.wait_ready()]
        with Proxy(name, servers).wait_ready() as proxy:
            seen: Counter[str] = Counter()
            numbers, stop, kills = itertools.count(), threading.Event(), [0]
            killer = threading.Thread(
                target=lambda: kills.append(kill_each_minute(servers, every_s, stop))
            )
            clients = [
                threading.Thread(target=ask, args=(proxy, texts, numbers, count, seen))
                for _ in range(CLIENTS)
            ]
            began = time.monotonic()
            for thread in (killer, *clients):
                thread.start()
            for thread in clients:
                thread.join()
            stop.set()
            killer.join()
            faults = sum(s.log.count("fault of the GPU") for s in servers)
            print(
                f"{name}: {dict(seen)}; {faults} faults, {kills[-1]} kills, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--proxy", choices=PROXIES, action="append")
    asked = parser.parse_args()
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as directory:
        make = ROOT / "tests" / "support" / "tiny_model.py"
        model = Path(directory, "model")
        subprocess.run([sys.executable, str(make), str(model)], check=True)
        for name in asked.proxy or PROXIES:
            run(name, model, asked.requests, asked.kill_every, Path(directory))


if __name__ == "__main__":
    main()
