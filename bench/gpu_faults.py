"""Jobs of `gpu.py` about faults that are injected: what they cost, and who is told."""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from pathlib import Path
from typing import Any

from gpu_support import ask, head, outcomes, row, together

from support.server import CONTROLLED, Server

FAULT_AT = 40  # the decode step that fails
ANSWER = 48
# Of Metal: out of memory drops what may be due to it, a timeout keeps the prompt cache.
CODES = (8, 2)


def recovery(args: argparse.Namespace, model: Path) -> list[Any]:
    """Fault to next token, beside reading the prompt anew, in pairs."""
    rows: list[Any] = []
    until = time.time() + args.seconds
    head("prompt", "code", "reading", "fault to next token", "ratio", "pairs")
    with Server(model, program=CONTROLLED) as server:
        server.wait_ready()
        for words, code in itertools.product(args.words or [500, 8000, 30000], CODES):
            _fault(server, words, code)  # shapes are compiled for the first time
            reads, waits = [], []
            for i in range(args.rounds):
                if time.time() > until:
                    break
                for fault in (False, True) if i % 2 else (True, False):
                    if fault:
                        waits.append(_fault(server, words, code))
                    else:
                        reads.append(ask(server, words + FAULT_AT, ANSWER).first)
            pairs = list(zip(reads, waits, strict=False))
            if not pairs:
                row(words, code, "left out: no time", "", "", "")
                continue
            ratios = [wait / read for read, wait in pairs]
            read, wait = statistics.median(reads), statistics.median(waits)
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            ratio = f"{statistics.median(ratios):.2f} {spread}"
            ms = [f"{1e3 * value:.0f} ms" for value in (read, wait)]
            row(words, code, *ms, ratio, len(pairs))
            rows.append([words, code, reads, waits])
    return rows


def _fault(server: Server, words: int, code: int) -> float:
    server.plan(f"decode:{FAULT_AT}:{code}")
    return ask(server, words, ANSWER).longest


# Says when the error is raised.
TIMED = """
import os, time
from mlx_safe import testing
plans = testing.plans
message = plans.cuda_message
def told(code):
    os.write(1, f"the fault: {time.time():.6f}\\n".encode())
    return message(code)
plans.cuda_message = told
"""
STICKY = {719: "launch failure", 700: "illegal address", 716: "misaligned"}
STICKY |= {710: "assert", 214: "ECC"}


def sticky(args: argparse.Namespace, model: Path) -> list[Any]:
    """The time from a sticky error to the last word at each client."""
    rows: list[Any] = []
    clients = (args.clients or [8])[0]
    head("error", "clients", "fault to the last client's end", "outcomes", "status")
    for code, name in STICKY.items():
        plan = f"decode:60:{code}:persistent:cuda"
        with Server(model, program=TIMED + CONTROLLED, inject=plan) as server:
            server.wait_ready()
            replies = together(clients, lambda i, s=server: ask(s, 50, 500))  # type: ignore[misc]
            status = server.wait()
            at = float(re.findall(r"the fault: ([0-9.]+)", server.log)[0])
            ms = 1e3 * (max(reply.ended for reply in replies) - at)
            told = "Traceback" in server.log
            row(name, clients, f"{ms:.0f} ms", outcomes(replies), f"{status} {told}")
            rows.append([name, clients, ms, outcomes(replies), status])
    rows.append(_supervised(model, clients))
    return rows


def _supervised(model: Path, clients: int) -> Any:
    """The same under a supervisor: when the next request is served."""
    plan = "decode:200:719:once:cuda"
    begin = time.time()
    with Server(model, "--supervise", inject=plan) as server:
        server.wait_ready()
        started = time.time() - begin
        replies = together(clients, lambda i: ask(server, 50, 500))
        ended = max(reply.ended for reply in replies)
        again = ask(server, 50, 4)
        after = again.arrivals[0] - ended if again.arrivals else float("nan")
        told = f"{outcomes(replies)}; then {again.outcome} after {after:.2f} s"
        row("supervised", clients, "", told, f"a start takes {started:.2f} s")
    return ["supervised", clients, started, after, outcomes(replies)]
