"""Two supervised servers behind a proxy: what clients see while one of them fails.

``.venvs/observe/bin/python bench/many_machines.py [--requests 1000]``, with HAProxy
and nginx installed; ``--proxy litellm`` with ``pip install 'litellm[proxy]==1.108.7'``
in ``.venvs/litellm``. Every 20th or so request meets a fault of the GPU, and every
``--kill-every`` seconds the process of one server is killed by SIGKILL, the servers in
turns. The proxies have the settings of `examples/`; each client has some
``X-Conversation`` of its own. Prints, by proxy: answers that were right, wrong, errors,
and streams that were cut, before or after a token; one of which something has come
cannot go to another server. Then how long a client waited at most, and what each server
was asked.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import secrets
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
from support.server import Answer, Server, eventually, free_port  # noqa: E402

LITELLM = ROOT / ".venvs" / "litellm" / "bin" / "litellm"
CLIENTS = 4
CONVERSATIONS = 8  # of each client: proxies spread them over the servers by their names
# A request of the load has about 20 steps; a process lives for some hundred requests.
STEPS_PER_FAULT = 400
PLAN = ",".join(f"any:{STEPS_PER_FAULT * i}:{8 if i % 2 else 2}" for i in range(1, 60))


class LiteLLM(Server):
    """LiteLLM's proxy with the settings of examples/litellm.yaml."""

    def __init__(self, servers: list[Server], directory: Path) -> None:
        if not LITELLM.exists():
            sys.exit(f"{LITELLM} is not there: pip install 'litellm[proxy]==1.108.7'")
        self.port = free_port()
        self.headers, self.tls = {}, None
        settings = (ROOT / "examples" / "litellm.yaml").read_text()
        for place, server in zip(("8081", "8082"), servers, strict=True):
            settings = settings.replace(f":{place}/", f":{server.port}/")
        file = directory / "litellm.yaml"
        file.write_text(settings)
        # Its list of prices comes from the network otherwise.
        key = f"sk-{secrets.token_hex(32)}"
        env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        env["LITELLM_MASTER_KEY"] = key
        self.headers["Authorization"] = f"Bearer {key}"
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.start([str(LITELLM), "--config", str(file), *where], env)

    def wait_ready(self) -> LiteLLM:
        def lives() -> bool:
            with contextlib.suppress(OSError):
                return self.get("/health/liveliness").status == 200
            time.sleep(0.2)
            return self.process.poll() is not None

        assert eventually(lives, 120) and self.process.poll() is None, self.log
        return self


def ask(
    proxy: Server,
    name: str,
    texts: list[tuple[dict[str, Any], str]],
    numbers: itertools.count[int],
    count: int,
    seen: Counter[str],
    waits: list[float],
) -> None:
    while (number := next(numbers)) < count:
        body, expected = texts[number % len(texts)]
        stream = number % 2 == 1
        talk = f"{name}, {number % CONVERSATIONS}"
        headers = {"X-Conversation": talk, "Content-Type": "application/json"}
        headers |= proxy.headers
        asked = {"model": "chat", **body} if isinstance(proxy, LiteLLM) else body
        began = time.monotonic()
        answer = proxy.post({**asked, "stream": stream}, headers=headers)
        waits.append(time.monotonic() - began)
        seen[what_came(answer, stream, expected)] += 1


def what_came(answer: Answer, stream: bool, expected: str) -> str:
    if answer.status is None:
        return f"no answer: {answer.broken}"
    if answer.status != 200:  # a proxy's own has no JSON
        return f"{answer.status}: {answer.body[:200]}"
    if answer.broken or (stream and not answer.done):
        return f"cut {'after' if answer.events else 'before'} a token"
    if answer.error:
        return f"an error: {answer.error}"
    return "right" if answer.text == expected else "WRONG"


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


def run(
    name: str, model: Path, count: int, every_s: float, hold_s: float, directory: Path
) -> None:
    texts = undisturbed(model, 1)
    env = {"MLX_SAFE_REPORT_DIR": str(directory / "reports")}
    flags = ("--supervise", "--hold-seconds", str(hold_s))
    with (
        Server(model, *flags, inject=PLAN, env=env) as one,
        Server(model, *flags, inject=PLAN, env=env) as two,
    ):
        servers = [one.wait_ready(), two.wait_ready()]
        with (
            LiteLLM(servers, directory)
            if name == "litellm"
            else Proxy(name, servers, example=True)
        ) as proxy:
            proxy.wait_ready()
            seen: Counter[str] = Counter()
            waits: list[float] = []
            numbers, stop, kills = itertools.count(), threading.Event(), [0]
            killer = threading.Thread(
                target=lambda: kills.append(kill_each_minute(servers, every_s, stop))
            )
            clients = [
                threading.Thread(
                    target=ask,
                    args=(proxy, f"client {i}", texts, numbers, count, seen, waits),
                )
                for i in range(CLIENTS)
            ]
            began = time.monotonic()
            for thread in (killer, *clients):
                thread.start()
            for thread in clients:
                thread.join()
            stop.set()
            killer.join()
            faults = sum(s.log.count("fault of the GPU") for s in servers)
            asked = [s.log.count("method=POST path=/v1/chat") for s in servers]
            print(
                f"{name}: {dict(seen)}; {faults} faults, {kills[-1]} kills, "
                f"answers of each server {asked}, at most {max(waits):.1f} s for one, "
                f"{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--hold-seconds", type=float, default=10.0)
    parser.add_argument("--proxy", choices=(*PROXIES, "litellm"), action="append")
    asked = parser.parse_args()
    print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as directory:
        make = ROOT / "tests" / "support" / "tiny_model.py"
        model = Path(directory, "model")
        subprocess.run([sys.executable, str(make), str(model)], check=True)
        for name in asked.proxy or PROXIES:
            every_s, hold_s = asked.kill_every, asked.hold_seconds
            run(name, model, asked.requests, every_s, hold_s, Path(directory))


if __name__ == "__main__":
    main()
