"""The job of `gpu.py` about two ranks: two cards with NCCL, or the ring anywhere."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_support import Reply, ask, head, outcomes, row, together

from support.server import PYTHON, Server, free_port

# Which collectives work, and where: asked of MLX itself, each in both ranks.
PROBE = """
import sys, threading
import mlx.core as mx
def tried(what, call):
    try:
        print(f"{what}: {call()}", flush=True)
    except Exception as e:
        print(f"{what}: {type(e).__name__}: {str(e).splitlines()[0][:150]}", flush=True)
group = mx.distributed.init()
def add(**where):
    def call():
        y = mx.distributed.all_sum(mx.array(1.0), **where)
        mx.eval(y)
        return y.item()
    return call
def all_of(thread):
    tried(f"{thread}: sum", add())
    tried(f"{thread}: sum, stream=cpu", add(stream=mx.cpu))
    tried(f"{thread}: sum again", add())
tried("rank, size", lambda: (group.rank(), group.size()))
all_of("main thread")
thread = threading.Thread(target=all_of, args=("another thread",))
thread.start()
thread.join()
def neighbours():
    if group.rank() == 0:
        y = mx.distributed.send(mx.ones((4,)), 1)
    else:
        y = mx.distributed.recv((4,), mx.float32, 0)
    mx.eval(y)
    return y.sum().item()
tried("send and recv", neighbours)
"""

START_S = 120.0
QUIET = re.compile("HTTP/1.1|sequences|Prompt processing")


class Ranks:
    """Two servers as ranks of one; see `environments`."""

    def __init__(
        self,
        model: Path,
        backend: str,
        *arguments: str,
        inject: tuple[str, str] = ("", ""),
        program: str | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        directory = self._stack.enter_context(tempfile.TemporaryDirectory())
        self.servers = []
        for env, plan in zip(environments(backend, directory), inject, strict=True):
            env["MLX_SAFE_REPORT_DIR"] = directory
            server = Server(model, *arguments, inject=plan, env=env, program=program)
            self.servers.append(self._stack.enter_context(server))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            # A rank may hang, and its peer with it; a server outlives its supervisor.
            for pid in [server.process.pid, *server.children()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._stack.close()

    @property
    def first(self) -> Server:
        return self.servers[0]

    def wait_served(self, seconds: float = START_S) -> Reply:
        """Asks until there is an answer; the last one."""
        until = time.time() + seconds
        reply = ask(self.first, 20, 4, timeout=seconds)
        while reply.status not in (200, 400) and time.time() < until:
            if self.first.process.poll() is not None:
                break
            time.sleep(0.05)
            reply = ask(self.first, 20, 4, timeout=seconds)
        return reply

    def statuses(self, seconds: float = 30.0) -> list[Any]:
        """How the ranks end by themselves; None: one does not."""
        found: list[Any] = []
        until = time.time() + seconds
        for server in self.servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.1, until - time.time()))
            found.append(server.process.poll())
        return found

    def tell(self) -> None:
        """The last lines of each log."""
        for rank, server in enumerate(self.servers):
            lines = [x for x in server.log.splitlines() if not QUIET.search(x)]
            for line in lines[-6:]:
                print(f"    rank {rank}: {line[:220]}", flush=True)


def environments(backend: str, directory: str) -> list[dict[str, str]]:
    """What `mlx.launch` sets for each of two ranks on this machine."""
    port = free_port(2)
    if backend == "nccl":
        common = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
        common |= {"MLX_WORLD_SIZE": "2"}
        own = [{"CUDA_VISIBLE_DEVICES": str(rank)} for rank in (0, 1)]
    else:
        hosts = Path(directory) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port + r}"] for r in (0, 1)]))
        common, own = {"MLX_HOSTFILE": str(hosts)}, [{}, {}]
    return [
        {**common, **own[rank], "MLX_RANK": str(rank), "PYTHONUNBUFFERED": "1"}
        for rank in (0, 1)
    ]


def probe(backend: str) -> list[str]:
    """What MLX's own collectives do; each rank says it."""
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            subprocess.Popen(
                [PYTHON, "-c", PROBE],
                env={**os.environ, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for env in environments(backend, directory)
        ]
        told = []
        for process in processes:
            try:
                told.append(process.communicate(timeout=60)[0])
            except subprocess.TimeoutExpired:
                process.kill()
                told.append(process.communicate()[0] + "(hangs)")
    for rank, text in enumerate(told):
        for line in text.splitlines():
            print(f"    rank {rank}: {line}", flush=True)
    return told


@contextlib.contextmanager
def streams(ranks: Ranks, clients: int, tokens: int) -> Iterator[list[Reply]]:
    """So many streams run meanwhile; their replies are there afterwards."""
    replies: list[Reply] = []
    done = threading.Thread(
        target=lambda: replies.extend(
            together(clients, lambda i: ask(ranks.first, 50, tokens))
        )
    )
    done.start()
    time.sleep(2.0)
    yield replies
    done.join()


def served(args: argparse.Namespace, model: Path) -> list[Any]:
    """Requests answered, and tokens/s."""
    with Ranks(model, args.backend) as ranks:
        begin = time.time()
        first = ranks.wait_served()
        start = time.time() - begin
        replies = together(8, lambda i: ask(ranks.first, 50, 64))
        seconds = max(r.ended for r in replies) - replies[0].sent
        speed = sum(r.tokens for r in replies) / seconds
        told = f"{outcomes([first, *replies])}, {speed:.0f} tokens/s"
        row("served", f"start {start:.1f} s", told, "", "")
        ranks.tell()
    return ["served", start, outcomes(replies), speed]


def pipeline(args: argparse.Namespace, model: Path) -> list[Any]:
    """``--pipeline``."""
    with Ranks(model, args.backend, "--pipeline") as ranks:
        reply = ranks.wait_served(40)
        row("--pipeline", "", reply.outcome, "", ranks.statuses(2))
        ranks.tell()
    return ["pipeline", reply.outcome]


def _hurt(name: str, ranks: Ranks, hurt: Any, supervised: bool) -> list[Any]:
    with streams(ranks, 4, 2000) as replies:
        at = time.time()
        if hurt is not None:
            hurt()
    ended = max(reply.ended for reply in replies)
    # Of a plan, the fault comes when it comes: the last token is the best sign of it.
    last = max((r.arrivals[-1] for r in replies if r.arrivals), default=at)
    at = at if hurt is not None else last
    told = f"{ended - at:.2f} s"
    if supervised:
        again = ranks.wait_served()
        after = f"{again.outcome} after {again.ended - ended:.1f} s"
        row(name, told, outcomes(replies), after, "")
    else:
        after = str(ranks.statuses())
        left = f"{time.time() - ended:.1f} s"
        row(name, told, outcomes(replies), f"left in {left}", after)
    ranks.tell()
    return [name, ended - at, outcomes(replies), after]


def killed(args: argparse.Namespace, model: Path) -> list[Any]:
    """A rank is killed in mid-stream."""
    with Ranks(model, args.backend) as ranks:
        ranks.wait_served()
        return _hurt("rank 1 killed", ranks, ranks.servers[1].process.kill, False)


def supervised(args: argparse.Namespace, model: Path) -> list[Any]:
    """The same with ``--supervise`` on each; then the first rank."""
    rows: list[Any] = []
    with Ranks(model, args.backend, "--supervise") as ranks:
        ranks.wait_served()
        for rank in (1, 0):
            name = f"rank {rank} killed, supervised"
            (pid,) = ranks.servers[rank].children()

            def kill(pid: int = pid) -> None:
                os.kill(pid, signal.SIGKILL)

            rows.append(_hurt(name, ranks, kill, True))
    return rows


def faults(args: argparse.Namespace, model: Path) -> list[Any]:
    """Out of memory, and a sticky error, on one rank each."""
    rows: list[Any] = []
    for name, code in (("out of memory", 2), ("sticky", 719)):
        for rank in (1, 0):
            plan = f"decode:150:{code}:persistent:cuda"
            plans = ("", plan) if rank else (plan, "")
            with Ranks(model, args.backend, inject=plans) as ranks:
                ranks.wait_served()
                rows.append(_hurt(f"{name}, rank {rank}", ranks, None, False))
    return rows


PARTS = {
    "served": served,
    "killed": killed,
    "supervised": supervised,
    "faults": faults,
    "pipeline": pipeline,
}


def ranks(args: argparse.Namespace, model: Path) -> list[Any]:
    """All parts, or ``--only`` some."""
    until = time.time() + args.seconds
    found: list[Any] = []
    if not args.only or "probe" in args.only:
        found.append(probe(args.backend))
    head("", "to the clients' end", "outcomes", "then", "statuses")
    for name, part in PARTS.items():
        if args.only and name not in args.only:
            continue
        if time.time() > until:
            row(name, "left out: no time", "", "", "")
            continue
        try:
            found.append(part(args, model))
        except Exception as e:  # the other parts are worth their time
            row(name, f"{type(e).__name__}: {str(e)[:500]}", "", "", "")
            print(e, file=sys.stderr)
    return found
