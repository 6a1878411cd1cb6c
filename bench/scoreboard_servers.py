"""Who takes part in the scoreboard, and how each is started, restarted and watched."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import peers

from support.server import PYTHON, Server, free_port
from support.usage import cpu_seconds

HERE = Path(__file__).resolve().parent
# How often the supervisor of the stock server looks after it, how long it waits for its
# answer, and how many it may owe in a row: a busy machine is no dead server.
WATCH_EVERY_S, HEALTH_S, SILENT_MAX = 0.5, 5.0, 3
START_S = 240.0
READ_S = 5.0  # for what it said last
STRIKES = (":raise", ":cuda")


@dataclass(frozen=True)
class Contestant:
    """One server.

    Attributes:
        name: for the command line and the data. title: for the table.
        command: with ``{model}``, ``{port}`` and ``{work}`` in it.
        ceiling: flags that tell it the size of the GPU, with ``{bytes}``.
        restarted: by a supervisor of this bench, when it ends or is not healthy.
        ours: whether mlx-safe protects it.
    """

    name: str
    title: str
    command: Sequence[str]
    ceiling: Sequence[str] = ()
    restarted: bool = False
    ours: bool = False
    peer: peers.Peer | None = None

    @property
    def is_installed(self) -> bool:
        return self.peer is None or self.peer.is_installed


MODEL = ("--model", "{model}", "--port", "{port}")
STOCK = (PYTHON, "-m", "mlx_lm", "server", *MODEL)
OURS = (PYTHON, "-m", "mlx_safe", "serve", *MODEL)
CEILING = ("--max-active-memory-bytes", "{bytes}")
FOREIGN = ("vllm-mlx-batched", "rapid-mlx", "mlx-vlm", "mtplx")
CONTESTANTS = [
    Contestant("stock", "mlx_lm.server", STOCK),
    Contestant("supervised", "mlx_lm.server, restarted", STOCK, restarted=True),
    Contestant("mlx-safe", "mlx-safe serve", OURS, CEILING, ours=True),
    Contestant(
        "mlx-safe-kv",
        "mlx-safe serve --kv-dir",
        (*OURS, "--kv-dir", "{work}/kv", "--kv-free-bytes", "0"),
        CEILING,
        ours=True,
    ),
    *(
        Contestant(peer.name, peer.versions.split(",")[0], peer.command, peer=peer)
        for peer in peers.PEERS
        if peer.name in FOREIGN
    ),
]


class Running(Server):
    """A contestant in a child process, with faults on demand.

    Args:
        work: a directory of its own.
        ceiling: bytes of the GPU; None: as many as there are. told: whether those that
            can be told of it are.
    """

    def __init__(
        self,
        contestant: Contestant,
        model: Path,
        work: Path,
        ceiling: int | None = None,
        *,
        told: bool = True,
    ) -> None:
        self.contestant, self.model, self.work = contestant, model, work
        self.port = free_port()
        self.headers, self.tls = {"Content-Type": "application/json"}, None
        self.starts = 0
        self._cpu_before, self._plans = 0.0, itertools.count(1)
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        for name in ("faults", "home"):
            (work / name).mkdir(parents=True, exist_ok=True)
        self._faults = work / "faults"
        words = list(contestant.command)
        if ceiling is not None and told:
            words += contestant.ceiling
        self._words = [
            w.format(model=model, port=self.port, work=work, bytes=ceiling)
            for w in words
        ]
        self._env = self._environment(ceiling)
        self._launch()

    def _environment(self, ceiling: int | None) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLX_SAFE_")}
        env |= {
            "PYTHONPATH": str(HERE / "scoreboard_startup"),
            "SCOREBOARD_DIR": str(self._faults),
            "MLX_SAFE_AUTOINSTALL": "1" if self.contestant.ours else "0",
            "MLX_SAFE_REPORT_DIR": str(self.work / "reports"),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.work / "home"),
        }
        if ceiling is not None:
            env["SCOREBOARD_CEILING"] = str(ceiling)
        peer = self.contestant.peer
        if peer is not None:
            self._words[0] = str(peer.bin / self._words[0])
            env |= {**peer.env, "PATH": f"{peer.bin}{os.pathsep}{env['PATH']}"}
        return env

    def _launch(self) -> None:
        self.starts += 1
        self.start(self._words, self._env)

    # -- while it runs ---------------------------------------------------------------

    def plan(self, text: str) -> None:
        """A fault from now on, or for the process that comes next."""
        number = next(self._plans)
        written = self._faults / f"new-{number}"
        written.write_text(text)
        written.rename(self._faults / f"plan-{number}")

    def fired(self) -> list[float]:
        """When faults have struck, `time.time`, each once."""
        found = []
        for file in self._faults.glob("fired-*"):
            lines = [line.split() for line in file.read_text().splitlines()]
            found += [float(when) for when, plan in lines if plan.endswith(STRIKES)]
        return sorted(found)

    def memory(self) -> tuple[int, int]:
        """(the most bytes that a step needed, steps that failed) under a ceiling."""
        told = [f.read_text().split() for f in self._faults.glob("memory-*")]
        return max(int(t[0]) for t in told), sum(int(t[1]) for t in told)

    def cpu_s(self) -> float:
        """Processor time so far, of all its processes one after another."""
        with contextlib.suppress(OSError):
            pids = self.process.pid, *self.children()
            return self._cpu_before + sum(map(cpu_seconds, pids))
        return self._cpu_before

    def is_ready(self) -> bool:
        body = {
            "model": str(self.model),
            "messages": [{"role": "user", "content": "warm"}],
            "max_tokens": 2,
        }
        with contextlib.suppress(OSError):
            return self.post(body, timeout=60).status == 200
        return False

    def wait_ready(self) -> Running:
        deadline = time.monotonic() + START_S
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"it does not answer:\n{self.log}")
            time.sleep(0.2)
        if self.contestant.restarted:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        silent = 0
        while not self._over.wait(WATCH_EVERY_S):
            try:
                healthy = self.get("/health", HEALTH_S).status == 200
                silent = 0
            except TimeoutError:
                silent += 1
                healthy = silent < SILENT_MAX
            except OSError:
                healthy = False
            if healthy:
                continue
            self._cpu_before = self.cpu_s()
            self._end()
            self._launch()
            while not self._over.wait(0.1) and self.process.poll() is None:
                with contextlib.suppress(OSError):
                    if self.get("/health", HEALTH_S).status == 200:
                        break

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait(30)
        self._reader.join(READ_S)  # or the pipe is closed under it
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def stop(self) -> int:
        self._over.set()
        if self._watcher is not None:
            self._watcher.join(START_S)
        self._end()
        return int(self.process.returncode)


@contextlib.contextmanager
def running(
    contestant: Contestant,
    model: Path,
    work: Path,
    ceiling: int | None = None,
    *,
    told: bool = True,
) -> Iterator[Running]:
    """One that answers; ended at the end of the block."""
    server = Running(contestant, model, work, ceiling, told=told)
    with server:
        server.wait_ready()
        yield server


def chosen(names: Sequence[str], card: bool = False) -> list[Contestant]:
    """Those named, or all, in their order; what is not installed is said.

    Args:
        card: ours are supervised, as what loses the card has to be replaced.
    """
    unknown = set(names) - {c.name for c in CONTESTANTS}
    if unknown:
        known = ", ".join(c.name for c in CONTESTANTS)
        sys.exit(f"no such server: {', '.join(sorted(unknown))}; there are {known}")
    asked = [c for c in CONTESTANTS if not names or c.name in names]
    for contestant in asked:
        if not contestant.is_installed:
            print(
                f"LEFT OUT: {contestant.name}: make .venvs/server-*.ready installs it"
            )
    found = [c for c in asked if c.is_installed]
    return [_supervised(c) if card and c.ours else c for c in found]


def _supervised(c: Contestant) -> Contestant:
    flag = "--supervise"
    return replace(c, command=(*c.command, flag), title=f"{c.title} {flag}")
