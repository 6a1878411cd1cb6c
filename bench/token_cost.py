"""What a token and a request cost, counted and not timed: protected beside stock.

    bench/token_cost.py [--tokens 50 250] [--top 25] [--strace] [--kv | --watching]
                        [--words 20]

``--watching``: in place of stock a protected server whose log, counters, samples and
notes are off, so that the difference is what an operator's view costs.

Bytecodes and calls of C functions that Python's threads execute, by function; the times
that threads were put to sleep (Linux); system calls, if asked for and strace is there.
A load of the machine changes none of it much, as it changes times. One client streams
answers of two lengths: a token is the difference, a request is what is left. With
``--kv`` the protected server with KV caches on disk, beside the same without; a prompt
of 256 words and more is written there.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_speed import PROTECTED, STOCK
from gpu_support import ask, make_model
from watching import SWITCHED

from support.server import Server, kept_in

UNWATCHED = f"import threading, time\n{SWITCHED}\nswitch('without')\n{PROTECTED}"
# Of the numbers that tell threads apart.
NUMBERS = re.compile(r"Thread-\d+ |\d+")

# In the server: on SIGUSR1 it writes what was executed so far, into $COUNTS.
COUNTED = """
import json, os, signal, sys, threading
from collections import Counter
codes, calls = {}, {}
def trace(frame, event, arg):
    mine = codes.setdefault(threading.current_thread().name, Counter())
    frame.f_trace_opcodes, frame.f_trace_lines = True, False
    code = frame.f_code
    def local(frame, event, arg):
        if event == "opcode":
            mine[code] += 1
        return local
    return local
def profile(frame, event, arg):
    if event == "c_call":
        who = threading.current_thread().name
        calls[who] = calls.get(who, 0) + 1
def tell(*_):
    found = {}
    for who, counter in list(codes.items()):
        found[who] = [calls.get(who, 0), {}]
        for code, n in list(counter.items()):
            file = code.co_filename.rpartition("site-packages/")[2][-40:]
            key = f"{file}:{code.co_qualname}"
            found[who][1][key] = found[who][1].get(key, 0) + n
    threads = {t.native_id: t.name for t in threading.enumerate()}
    with open(os.environ["COUNTS"] + ".new", "w") as f:
        json.dump([found, threads], f)
    os.rename(os.environ["COUNTS"] + ".new", os.environ["COUNTS"])
signal.signal(signal.SIGUSR1, tell)
if "COUNTED" in os.environ:
    threading.settrace(trace)
    threading.setprofile(profile)
"""


def one(server: Server, words: int, tokens: int) -> None:
    reply = ask(server, words, tokens)
    assert reply.tokens >= tokens - 1, reply.outcome
    time.sleep(0.3)  # until it is stored


def told(server: Server, path: Path) -> tuple[Any, dict[str, str]]:
    """What was counted so far, and the names of Python's threads."""
    path.unlink(missing_ok=True)
    server.process.send_signal(signal.SIGUSR1)
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, "the server does not tell"
        time.sleep(0.02)
    counted, threads = json.loads(path.read_text())
    return counted, threads


def counts(server: Server, path: Path) -> Counter[tuple[str, str]]:
    """(thread, function or ""): bytecodes, or calls of C functions, so far."""
    found: Counter[tuple[str, str]] = Counter()
    for thread, (calls, codes) in told(server, path)[0].items():
        who = NUMBERS.sub("", thread)
        found[who, ""] += calls
        for name, n in codes.items():
            found[who, name] += n
    return found


@contextmanager
def syscalls(server: Server, wanted: bool) -> Iterator[Counter[tuple[str, str]]]:
    """System calls of all its threads meanwhile, by name."""
    found: Counter[tuple[str, str]] = Counter()
    if not wanted:
        yield found
        return
    with tempfile.NamedTemporaryFile("r") as file:
        command = ["strace", "-f", "-qq", "-c", "-o", file.name]
        tracer = subprocess.Popen([*command, "-p", str(server.process.pid)])
        time.sleep(1.0)
        yield found
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
        for line in file:
            parts = line.split()
            if len(parts) >= 5 and parts[3].isdigit() and parts[-1] != "total":
                found["syscalls", parts[-1]] += int(parts[3])


def sleeps(server: Server, path: Path) -> Counter[tuple[str, str]]:
    """How often its threads have gone to sleep so far, by their name."""
    found: Counter[tuple[str, str]] = Counter()
    names = told(server, path)[1]
    for task in Path(f"/proc/{server.process.pid}/task").glob("*/status"):
        try:
            fields = dict(x.split(":\t", 1) for x in task.read_text().splitlines())
        except (OSError, ValueError):
            continue  # it has just ended
        times = int(fields["voluntary_ctxt_switches"])
        name = names.get(fields["Pid"].strip(), "MLX's own")
        found["sleeps", NUMBERS.sub("", name)] += times
    return found


def measure(
    model: Path,
    program: str,
    flags: Sequence[str],
    args: argparse.Namespace,
    path: Path,
) -> tuple[Counter[Any], Counter[Any]]:
    """What a token costs, and what a request does besides."""
    env = {"MLX_SAFE_AUTOINSTALL": "0"} if program is STOCK else {}
    env["COUNTS"] = str(path)
    runs: list[Counter[Any]] = []
    program = COUNTED + program
    with Server(model, *flags, program=program, env=env | {"COUNTED": "1"}) as server:
        server.wait_ready()
        one(server, args.words, args.tokens[0])
        for tokens in args.tokens:
            before = counts(server, path)
            one(server, args.words, tokens)
            after = counts(server, path)
            runs.append(Counter({k: after[k] - before[k] for k in after}))
    with Server(model, *flags, program=program, env=env) as server:
        server.wait_ready()
        one(server, args.words, args.tokens[0])
        for i, tokens in enumerate(args.tokens):
            with syscalls(server, args.strace) as calls:
                before = sleeps(server, path)
                one(server, args.words, tokens)
                after = sleeps(server, path)
            runs[i].update({k: after[k] - before[k] for k in after})
            runs[i].update(calls)
    short, long = args.tokens
    token = Counter({k: (runs[1][k] - runs[0][k]) / (long - short) for k in runs[1]})
    return token, Counter({k: runs[0][k] - short * token[k] for k in runs[0]})


def total(found: Counter[Any], what: str) -> float:
    """Of ``bytecodes``, ``C calls``, ``sleeps`` or ``syscalls``."""
    kinds = ("sleeps", "syscalls")
    if what in kinds:
        return sum(n for (who, _), n in found.items() if who == what)
    wanted = (x for x in found.items() if x[0][0] not in kinds)
    return sum(n for (_, name), n in wanted if (name == "") == (what == "C calls"))


def show(what: str, found: dict[str, Counter[Any]], top: int) -> None:
    print(f"\n## {what}: {', '.join(found)}, ratio")
    for kind in ("bytecodes", "C calls", "sleeps", "syscalls"):
        a, b = (total(costs, kind) for costs in found.values())
        if a > 0:
            print(f"{kind:>10}: {a:9.1f} {b:9.1f}  {b / a:.3f}")
    one, other = found.values()
    names = sorted({*one, *other}, key=lambda k: -abs(other[k] - one[k]))
    for key in names[:top]:
        more = other[key] - one[key]
        name = " ".join((*key[:1], key[1] or "(C calls)"))
        print(f"{more:+9.2f} {one[key]:9.2f} {other[key]:9.2f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument)
    add("--tokens", type=int, nargs=2, default=[50, 250])
    add("--top", type=int, default=25, help="lines of functions")
    add("--strace", action="store_true")
    add("--kv", action="store_true", help="with --kv-dir beside without")
    add("--watching", action="store_true", help="with it and without, not beside stock")
    add("--words", type=int, default=20, help="of a prompt")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        model = make_model(path / "model", 64, 2)
        servers: dict[str, tuple[str, tuple[str, ...]]]
        servers = {"stock": (STOCK, ()), "protected": (PROTECTED, ())}
        if args.watching:
            servers = {"without": (UNWATCHED, ()), "with": (PROTECTED, ())}
        if args.kv:
            kept = kept_in(path / "kv")
            servers = {"off": (PROTECTED, ()), "on": (PROTECTED, kept)}
        found = {
            name: measure(model, program, flags, args, path / "counts")
            for name, (program, flags) in servers.items()
        }
    for i, what in enumerate(("a token", "a request")):
        show(what, {name: found[name][i] for name in found}, args.top)


if __name__ == "__main__":
    main()
