"""Random load, faults, kills and rude clients; nothing may be left of them.

``make soak MINUTES=120``, or ``.venvs/observe/bin/python bench/soak.py --minutes 5
[--seed N]``. Three servers with a tiny model:

- *faulted*: faults come to it, of every code that a process survives.
- *killed*, supervised: SIGKILL and the codes after which a process must be replaced end
  it. Its KV caches and crash reports are on a disk that is full (as root; else on one
  that is not, which is said).
- *pressed*: on a card that another program takes most of, now and then.

After each minute everything stands still and is looked at. Every answer must have been
right or an error of the contract. Memory, threads, descriptors, temporary files and
disk must be where they were after the first minute. `/metrics` must count the answers
that the clients read. Of the killed one it is the supervisor that is looked at. The
first minute that is not clean ends the run, with status 1.
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

from support.programs import program  # noqa: E402
from support.server import CONTROLLED, NEVER, Server, eventually, kept_in  # noqa: E402

TEXTS = 40
# Those of IOGPU, and one that nobody knows. What ends a process comes to the supervised
# server: code 4, and an exception on a thread of nobody's.
FAULTS = (0x2, 0x3, 0x5, 0x6, 0x8, 0x9, 0xA, 0xB, 0xE, 0x10, 0x11, 0x7F)
FATAL = ("4", "8:once:terminate")
ACTIONS = ("raise", "record", "bug")
KV_LIMIT, DISK = 16 * 2**20, 8 * 2**20
KILL_EVERY_S = 15.0
# What the pressed server's card has, and what another program takes of it.
CARD, BALLAST = 10**8, (3 * 10**7, 8 * 10**7, 9 * 10**7)
# Of crash reports (docs/reports.md).
REPORTS, REPORTS_BYTES = 50, 20 * 2**20
# Read by the interpreter at its start. Each of the supervised server's processes has a
# fault of its own to come. What glibc's arenas keep of large bodies is no leak: some
# megabytes for each thread that has had one, given back before anything is measured.
GIVEN_BACK = "soak: memory that is free is given back"
SITE = f"""\
import ctypes, os, pathlib, signal
def give_back(*_):
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    os.write(2, b"{GIVEN_BACK}\\n")
if "SOAK_PLAN" in os.environ:
    os.environ["MLX_SAFE_INJECT"] = pathlib.Path(os.environ["SOAK_PLAN"]).read_text()
else:
    signal.signal(signal.SIGUSR2, give_back)
"""
# What may be more than after the first minute: a connection that is not closed yet,
# what Python's allocator keeps.
MORE = {"threads": 4, "descriptors": 8, "files": 0, "memory": 2**20, "resident": 2**26}


@dataclass
class Left:
    """What a server has when nobody asks it anything.

    Attributes:
        memory: bytes of MLX's arrays, where it can be asked.
        resident: bytes, without what MLX keeps for reuse, which is as much as the
            largest step has taken.
    """

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


def left(server: Server, directory: Path, memory: int = 0, pool: int = 0) -> Left:
    pid = server.process.pid
    return Left(
        threads=status_of(pid, "Threads"),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        files=len(list((directory / "tmp").iterdir())),
        memory=memory,
        resident=1024 * status_of(pid, "VmRSS") - pool,
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
    """Kills the supervised server's child, which its supervisor starts again.

    One that has answered nothing is left alone: after some of those in a row the
    supervisor gives up.

    Args:
        plan: the file that says which fault ends the next one, if nothing else does.
        told: what its clients were told.
    """

    def __init__(self, server: Server, seed: str, plan: Path, told: Told) -> None:
        super().__init__(server, seed)
        self._plan, self._told = plan, told

    def run(self) -> None:
        draw, seen = self._draw, -1
        while not self.stop.wait(KILL_EVERY_S * draw.uniform(0.5, 1.5)):
            if seen == (seen := self._told.statuses[200]):
                continue
            self._plan.write_text(f"any:{draw.randrange(99, 900)}:{draw.choice(FATAL)}")
            for pid in self._server.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.done += 1


class Ballast(Harm):
    """Takes memory of the pressed server's card, and gives it back."""

    def __init__(self, server: Server, seed: str, file: Path) -> None:
        super().__init__(server, seed)
        self._file = file

    def run(self) -> None:
        while not self.stop.wait(self._draw.uniform(1.0, 5.0)):
            size = self._draw.choice(BALLAST)
            # In one piece: the server reads the file at any time.
            self._file.with_suffix(".new").write_text(str(size))
            self._file.with_suffix(".new").rename(self._file)
            self.done += 1
            self.stop.wait(self._draw.uniform(1.0, 10.0))
            self._file.unlink()


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
    """The run: the servers, their clients, and what is looked at after each minute."""

    def __init__(self, directory: Path, model: Path, asked: argparse.Namespace) -> None:
        self._seed, self._asked = asked.seed, asked
        self._texts = undisturbed(model, self._seed)
        for name in ("tmp", "site", "reports"):
            (directory / name).mkdir()
        (directory / "site" / "sitecustomize.py").write_text(SITE)
        self._plan = directory / "plan"
        self._plan.write_text(f"any:700:{FATAL[0]}")
        self._ballast = directory / "ballast"
        self._directory = directory
        self._reports = (directory / "reports", directory / "disk" / "reports")
        tmp, reports = {"TMPDIR": str(directory / "tmp")}, "MLX_SAFE_REPORT_DIR"
        tmp["PYTHONPATH"] = str(directory / "site")
        env = tmp | {reports: str(self._reports[0])}
        self.faulted = Server(
            model, "--prompt-cache-bytes", "4M", program=CONTROLLED, env=env
        )
        kv = kept_in(directory / "disk" / "kv")
        self.killed = Server(
            model,
            *("--supervise", *kv, "--kv-disk-bytes", str(KV_LIMIT)),
            env=tmp
            | {
                reports: str(self._reports[1]),
                "SOAK_PLAN": str(self._plan),
            },
        )
        self.pressed = Server(
            model,
            program=program("small_card"),
            env=env | {"CARD": str(CARD), "BALLAST": str(self._ballast)},
        )
        self.servers = {
            "faulted": self.faulted,
            "killed": self.killed,
            "pressed": self.pressed,
        }
        self._first: dict[str, Left] = {}
        self._resident: dict[str, int] = {}
        self._pool: dict[str, int] = {}
        self._seen = {name: Told() for name in self.servers}

    def minute(self, number: int, seconds: float) -> list[str]:
        """Runs for so long; one line for each thing that is not as it should be."""
        crowd = [
            Client(
                server,
                f"{self._seed}:{number}:{i}:{name}",
                self._texts,
                self._seen[name],
                may_be_cut=server is self.killed,
                pause=self._asked.pause,
            )
            for name, server in self.servers.items()
            for i in range(self._asked.clients)
        ]
        seed = f"{self._seed}:{number}"
        harm = (
            Faults(self.faulted, f"{seed}:faults"),
            Kills(self.killed, f"{seed}:kills", self._plan, self._seen["killed"]),
            Ballast(self.pressed, f"{seed}:ballast", self._ballast),
        )
        for thread in harm:
            thread.start()
        with Crowd(crowd) as running:
            time.sleep(seconds)
        for thread in harm:
            thread.stop.set()
            thread.join(60)
        self.faulted.plan(f"any:{NEVER}")
        wrong = [f"the soak itself: {e!r}" for e in running.failed]
        wrong += [
            f"{name}: {x}" for name, told in self._seen.items() for x in told.wrong
        ]
        wrong += self._comes_to_rest()
        self._say(number, *(thread.done for thread in harm))
        return wrong

    def _comes_to_rest(self) -> list[str]:
        wrong = []
        for name, server in self.servers.items():
            if server.process.poll() is not None:
                return [f"{name} ended:\n{server.log[-4000:]}"]
            if not eventually(functools.partial(is_well, server), 120):
                wrong.append(f"{name} is not well again:\n{server.log[-4000:]}")
        for name in ("faulted", "pressed"):
            if not eventually(functools.partial(is_idle, self.servers[name]), 60):
                wrong.append(f"{name}: a request is left in flight")
            wrong += [f"{name}: {x}" for x in self._adds_up(name)]
        self.faulted.ask("forget")
        for name in self.servers:
            wrong += [f"{name}: {x}" for x in self._grown(name)]
        return wrong + self._kept()

    def _grown(self, name: str) -> list[str]:
        first = self._first.get(name)
        if first is None:
            self._first[name] = self._left(name)
            print(f"{name} after the first minute: {self._first[name]}", flush=True)
            return []
        now = self._left(name)
        self._resident[name] = now.resident >> 20
        grown = now.grown(first)
        if grown:
            # What a moment keeps, a connection of one who left say, is gone in another.
            time.sleep(10)
            grown = self._left(name).grown(first)
        return grown

    def _left(self, name: str) -> Left:
        server = self.servers[name]
        if server is self.killed:
            return left(server, self._directory)
        seen = server.log.count(GIVEN_BACK)
        server.process.send_signal(signal.SIGUSR2)
        if not eventually(lambda: server.log.count(GIVEN_BACK) > seen):
            raise SystemExit(f"{name} does not say that it has given memory back")
        memory = server.ask("memory") if server is self.faulted else 0
        pool = int(server.metric("mlx_safe_memory_pool_bytes"))
        self._pool[name] = pool >> 20
        return left(server, self._directory, memory, pool)

    def _kept(self) -> list[str]:
        """What takes more of the disk than it may."""
        found = []
        kept = sum(size_of_files(self._directory / "disk" / "kv"))
        if kept > KV_LIMIT:
            found.append(f"KV caches take {kept} bytes of {KV_LIMIT}")
        for reports in self._reports:
            # The oldest go when a process starts that finds a new one. Beside a report
            # are empty files, and the run files of those who run.
            count = len([*reports.glob("[0-9]*.json")])
            size = sum(size_of_files(reports))
            if count > REPORTS + 5 or size > 2 * REPORTS_BYTES:
                found.append(f"{count} reports in {size} bytes")
        return found

    def _adds_up(self, name: str) -> list[str]:
        """Whether it counts all answers that clients have read, and no more than asked.

        Who leaves, and who is refused before the body is read, may have been counted.
        """
        told = self._seen[name]
        counted = answers(self.servers[name])
        found = []
        for status, n in told.statuses.items():
            if (m := counted[str(status)]) < n:
                found.append(f"clients read {n} answers of {status}, /metrics has {m}")
        asked = sum(told.outcomes.values())
        if counted.total() > asked:
            found.append(f"clients asked {asked}, /metrics counts {counted.total()}")
        return found

    def _say(self, number: int, planned: int, kills: int, ballasts: int) -> None:
        at = time.strftime("%H:%M:%S")
        print(
            f"minute {number}, {at}: {planned} faults planned, {kills} kills, "
            f"the ballast came {ballasts} times; resident, MiB: {self._resident}, "
            f"MLX's pool: {self._pool}"
        )
        if number % self._asked.table == 0:
            for name, told in self._seen.items():
                for (asked, came), n in sorted(told.outcomes.items()):
                    print(f"  {name:8} {asked:13} {came:40} {n:6}")
        sys.stdout.flush()


def size_of_files(directory: Path) -> list[int]:
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            if path.is_file():
                found.append(path.stat().st_size)
    return found


def is_idle(server: Server) -> bool:
    return server.metric("mlx_safe_requests_in_flight") == 0


def is_well(server: Server) -> bool:
    with contextlib.suppress(OSError):
        return server.get("/health").status == 200
    return False


def answers(server: Server) -> Counter[str]:
    """By status, ``"none"`` where nothing was sent, from `/metrics`."""
    found: Counter[str] = Counter()
    for line in server.get("/metrics").body.splitlines():
        status = re.search(r'^mlx_safe_requests_total\{.*status="(\w+)"', line)
        if status is not None:
            found[status[1]] += int(float(line.rsplit(" ", 1)[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    fresh = random.SystemRandom().randrange(2**32)
    parser.add_argument("--seed", type=int, default=fresh)
    for flag, default, what in (
        ("--clients", 4, "of each server"),
        ("--every", 60.0, "seconds of load before everything is looked at"),
        ("--pause", 0.0, "seconds that a client thinks, on average, at most 60"),
        ("--table", 1, "what clients were told is printed after so many minutes"),
    ):
        parser.add_argument(
            flag, type=type(default), default=default, help=f"{what} ({default})"
        )
    asked = parser.parse_args()
    if min(asked.minutes, asked.clients, asked.every, asked.table) <= 0:
        parser.error("--minutes, --clients, --every and --table must be over 0")
    # Its servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
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
            soak = Soak(directory, model, asked)
            with contextlib.ExitStack() as stack:
                for server in soak.servers.values():
                    stack.enter_context(server)
                for server in soak.servers.values():
                    server.wait_ready()
                run(soak, asked)


def run(soak: Soak, asked: argparse.Namespace) -> None:
    number, began = 0, time.monotonic()
    while (rest := began + 60 * asked.minutes - time.monotonic()) > 1:
        number += 1
        wrong = soak.minute(number, min(asked.every, rest))
        if wrong:
            print("\n".join(wrong))
            sys.exit(1)
    minutes = (time.monotonic() - began) / 60
    print(f"clean: {minutes:.1f} minutes, looked at {number} times")


if __name__ == "__main__":
    main()
