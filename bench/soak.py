"""Random load, faults, kills and rude clients; nothing may be left of them.

``make soak MINUTES=120``, or ``.venvs/observe/bin/python bench/soak.py --minutes 5
[--seed N]``. Two servers with a tiny model: to one come faults of every code that a
process survives; the other one, supervised, is killed by SIGKILL and by fatal faults,
with its KV caches on a disk that is full (as root; else on one that is not, which is
said).

After each minute everything stands still and is looked at: whether every answer was
right or an error of the contract, whether memory, threads, descriptors, temporary files
and disk are where they were after the first minute, and whether `/metrics` counts the
answers that the clients read. The first minute that is not clean ends the run, with
status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from soak_load import Client, Crowd, Told, prompts  # noqa: E402

from support.server import CONTROLLED, NEVER, Server, eventually  # noqa: E402

CLIENTS = 4  # of each server
TEXTS = 40
# 4, 9 to 0xb: the process is replaced; those the supervised server gets.
FAULTS = (0x2, 0x3, 0x5, 0x6, 0x8, 0xE, 0x10, 0x11)
FATAL = (0x4, 0xB)
ACTIONS = ("raise", "record", "bug")
KV_LIMIT, DISK = 16 * 2**20, 8 * 2**20
KILL_EVERY_S = 15.0
# What may be more than after the first minute: a connection that is not closed yet,
# what Python's allocator keeps.
MORE = {"threads": 4, "descriptors": 8, "files": 0, "memory": 2**20, "resident": 2**26}


@dataclass
class Left:
    """What a server has when nobody asks it anything."""

    threads: int
    descriptors: int
    files: int
    memory: int
    resident: int

    def grown(self, first: Left) -> list[str]:
        found = []
        for x in fields(self):
            now, then = getattr(self, x.name), getattr(first, x.name)
            if now > then + MORE[x.name]:
                found.append(f"{x.name}: {then} after the first minute, now {now}")
        return found


def status_of(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


def left(server: Server, directory: Path, memory: int) -> Left:
    pid = server.process.pid
    return Left(
        threads=status_of(pid, "Threads"),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        files=len(list((directory / "tmp").iterdir())),
        memory=memory,
        resident=1024 * status_of(pid, "VmRSS"),
    )


class Harm(threading.Thread):
    """Does a server harm now and then, until ``stop`` is set; ``done``: how often."""

    def __init__(self, server: Server, seed: str) -> None:
        super().__init__(daemon=True)
        self._server, self._draw = server, random.Random(seed)
        self.done, self.stop = 0, threading.Event()


class Faults(Harm):
    """Plans a fault every now and then: any code, phase, way, once or lasting."""

    def run(self) -> None:
        draw = self._draw
        while not self.stop.wait(draw.uniform(0.3, 3.0)):
            phase = draw.choice(("prefill", "decode", "any"))
            lasting = "persistent" if draw.random() < 0.1 else "once"
            plan = (
                f"{phase}:{draw.randrange(1, 40)}:{draw.choice(FAULTS)}"
                f":{lasting}:{draw.choice(ACTIONS)}"
            )
            self._server.plan(plan)
            self.done += 1
            if lasting == "persistent":
                self.stop.wait(draw.uniform(0.2, 1.0))
                self._server.plan(f"any:{NEVER}")


class Kills(Harm):
    """Kills the supervised server's child, which its supervisor starts again."""

    def run(self) -> None:
        while not self.stop.wait(KILL_EVERY_S * self._draw.uniform(0.5, 1.5)):
            for pid in self._server.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.done += 1


@contextlib.contextmanager
def full_disk(directory: Path) -> Iterator[Path]:
    """A directory on a disk that is soon full; without root, on one that is not."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(directory)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the disk is not a full one: {done.stderr.strip()}", flush=True)
    try:
        yield directory
    finally:
        if not done.returncode:
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def undisturbed(model: Path, seed: int) -> list[tuple[dict[str, Any], str]]:
    """The prompts, and what the model says to each."""
    with Server(model).wait_ready() as server:
        found = []
        for body in prompts(seed, TEXTS):
            answer = server.post(body)
            assert answer.status == 200, answer.body
            found.append((body, answer.text))
        return found


class Soak:
    """The run: two servers, their clients, and what is looked at after each minute."""

    def __init__(self, directory: Path, model: Path, seed: int) -> None:
        self._seed = seed
        self._texts = undisturbed(model, seed)
        (directory / "tmp").mkdir()
        self._directory = directory
        env = {"TMPDIR": str(directory / "tmp"), "MLX_SAFE_DIR": str(directory)}
        self.faulted = Server(
            model,
            *("--prompt-cache-bytes", "4M"),
            program=CONTROLLED,
            env=env,
        )
        kv = ("--kv-dir", str(directory / "disk" / "kv"))
        self.killed = Server(
            model,
            *("--supervise", *kv, "--kv-disk-bytes", str(KV_LIMIT)),
            inject=",".join(f"any:{700 + 300 * i}:{x}" for i, x in enumerate(FATAL)),
            env=env,
        )
        self.first: Left | None = None
        self._seen: dict[Server, Told] = {self.faulted: Told(), self.killed: Told()}

    def minute(self, number: int, seconds: float) -> list[str]:
        """Runs for so long; one line for each thing that is not as it should be."""
        crowd = [
            Client(
                server,
                f"{self._seed}:{number}:{i}:{server is self.killed}",
                self._texts,
                self._seen[server],
                may_be_cut=server is self.killed,
            )
            for server in self._seen
            for i in range(CLIENTS)
        ]
        faults = Faults(self.faulted, f"{self._seed}:{number}:faults")
        kills = Kills(self.killed, f"{self._seed}:{number}:kills")
        for thread in (faults, kills):
            thread.start()
        with Crowd(crowd) as running:
            time.sleep(seconds)
        for thread in (faults, kills):
            thread.stop.set()
            thread.join(60)
        self.faulted.plan(f"any:{NEVER}")
        wrong = [f"the soak itself: {e!r}" for e in running.failed]
        wrong += [x for told in self._seen.values() for x in told.wrong]
        wrong += self._comes_to_rest()
        self._say(number, faults.done, kills.done)
        return wrong

    def _comes_to_rest(self) -> list[str]:
        wrong = []
        for server in self._seen:
            if server.process.poll() is not None:
                return [f"a server ended:\n{server.log[-4000:]}"]
            if not eventually(functools.partial(is_well, server), 120):
                wrong.append("it is not well again:\n" + server.log[-4000:])
        idle = "mlx_safe_requests_in_flight"
        if not eventually(lambda: self.faulted.metric(idle) == 0, 60):
            wrong.append("a request is left in flight")
        wrong += self._adds_up()
        self.faulted.ask("forget")
        now = left(self.faulted, self._directory, self.faulted.ask("memory"))
        if self.first is None:
            self.first = now
            print(f"after the first minute: {now}", flush=True)
        # What a moment keeps, a connection of one who left say, is gone in another.
        grown = now.grown(self.first)
        if grown:
            time.sleep(10)
            now = left(self.faulted, self._directory, self.faulted.ask("memory"))
            grown = now.grown(self.first)
        kept = sum(
            x.stat().st_size
            for x in (self._directory / "disk").rglob("*")
            if x.is_file()
        )
        if kept > KV_LIMIT:
            grown.append(f"KV caches take {kept} bytes of {KV_LIMIT}")
        return wrong + grown

    def _adds_up(self) -> list[str]:
        """Whether the server counts no fewer answers than the clients have read."""
        read = self._seen[self.faulted].statuses
        counted = answers(self.faulted)
        return [
            f"clients read {n} answers of {status}, /metrics counts {counted[status]}"
            for status, n in read.items()
            if counted[status] < n
        ]

    def _say(self, number: int, planned: int, kills: int) -> None:
        print(f"minute {number}: {planned} faults planned, {kills} kills")
        for server, told in self._seen.items():
            name = "killed" if server is self.killed else "faulted"
            for (asked, came), n in sorted(told.outcomes.items()):
                print(f"  {name:8} {asked:13} {came:40} {n:6}")
        sys.stdout.flush()


def is_well(server: Server) -> bool:
    with contextlib.suppress(OSError):
        return server.get("/health").status == 200
    return False


def answers(server: Server) -> Counter[int]:
    """By status, from `/metrics`."""
    found: Counter[int] = Counter()
    for line in server.get("/metrics").body.splitlines():
        status = re.search(r'^mlx_safe_requests_total\{.*status="(\d+)"', line)
        if status is not None:
            found[int(status[1])] += int(float(line.rsplit(" ", 1)[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    fresh = random.SystemRandom().randrange(2**32)
    parser.add_argument("--seed", type=int, default=fresh)
    asked = parser.parse_args()
    print(
        f"seed {asked.seed}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "disk").mkdir()
        make = ROOT / "tests" / "support" / "tiny_model.py"
        model = directory / "model"
        subprocess.run([sys.executable, str(make), str(model)], check=True)
        with full_disk(directory / "disk"):
            soak = Soak(directory, model, asked.seed)
            with soak.faulted.wait_ready(), soak.killed.wait_ready():
                run(soak, asked.minutes)


def run(soak: Soak, minutes: float) -> None:
    number, ends = 0, time.monotonic() + 60 * minutes
    while (rest := ends - time.monotonic()) > 1:
        number += 1
        wrong = soak.minute(number, min(60.0, rest))
        if wrong:
            print("\n".join(wrong))
            sys.exit(1)
    print(f"clean: {number} minutes")


if __name__ == "__main__":
    main()
