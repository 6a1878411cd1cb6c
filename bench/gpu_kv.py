"""Jobs of `gpu.py` about KV caches on disk: the same server with them and without."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_speed import PROTECTED, in_turn
from gpu_support import Reply, ask, head, interval, prompt, row, write_log

from support.server import CONTROLLED, NEVER, Server, kept_in

SIZE = "12G"
USAGE: Any = {"stream_options": {"include_usage": True}}


def start(model: Path, directory: Path | None, program: str = CONTROLLED) -> Server:
    flags = () if directory is None else kept_in(directory)
    flags += () if directory is None else ("--kv-disk-bytes", SIZE)
    inject = f"any:{NEVER}" if program == CONTROLLED else ""
    server = Server(model, *flags, program=program, inject=inject)
    return server.wait_ready()


def _restored(server: Server) -> tuple[int, int]:
    """How many were; how many were not, as reading is quicker."""
    names = ("restored", "not_cheaper")
    return tuple(int(server.metric(f"mlx_safe_kv_disk_{n}_total")) for n in names)  # type: ignore[return-value]


def settle(server: Server) -> float:
    """Seconds until all that was taken is on disk."""
    begun = time.time()
    while server.metric("mlx_safe_kv_disk_waiting_bytes") > 0:
        time.sleep(0.02)
    return time.time() - begun


def lives(args: argparse.Namespace, model: Path) -> list[Any]:
    """Out of memory and kill -9, beside reading the prompt, without the tier and with.

    On the sequential path (a seed), where memory has nothing of a prompt before its
    answer has ended. The fault comes eight tokens before that.
    """
    counts = args.words or [4000, 16000, 30000]
    texts = {n: [prompt(n) for _ in range(args.rounds + 2)] for n in counts}
    rows: list[Any] = []
    head("tier", "prompt", "what", "reading", "to the next token", "ratio", "from disk")
    for tier in ("off", "on"):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) if tier == "on" else None
            rows += _life(args, model, directory, texts)
    off, on = ({(r[1], r[2]): r[5:] for r in rows if r[0] == t} for t in ("off", "on"))
    for (words, what), texts_on in on.items():
        same = [a == b for a, b in zip(off[words, what], texts_on, strict=True)]
        row(
            "on",
            words,
            what,
            f"{sum(same)} of {len(same)} texts as without",
            "",
            "",
            "",
        )
    return rows


def _life(
    args: argparse.Namespace,
    model: Path,
    directory: Path | None,
    texts: dict[int, list[str]],
) -> list[Any]:
    tier = "off" if directory is None else "on"
    rows: list[Any] = []
    last: dict[int, tuple[Reply, str]] = {}
    with start(model, directory) as server:
        for words, (shapes, _, *some) in texts.items():
            _fault(server, args, shapes)  # they are compiled for the first time
            before = _restored(server)
            found = [_fault(server, args, text) for text in some]
            told = [b - a for a, b in zip(before, _restored(server), strict=True)]
            pairs = [(reply.first, reply.longest) for reply in found]
            said = f"{told[0]} times, {told[1]} times reading was taken for quicker"
            rows.append(_told(tier, words, "out of memory", pairs, said))
            rows[-1] += [reply.text for reply in found]
            last[words] = found[-1], some[-1]
        if directory:
            row(
                tier, "", f"all is on disk after {settle(server):.1f} s", "", "", "", ""
            )
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
        write_log(server.log)
    with start(model, directory) as server:
        for words, (first, text) in last.items():
            ask(server, 0, 4, text=texts[words][1])  # the shapes, and the speed
            messages = [
                {"role": "user", "content": text},
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": "w9 w8 w7"},
            ]
            again = ask(server, 0, 16, messages=messages, **USAGE)
            cached = (again.usage.get("prompt_tokens_details") or {}).get(
                "cached_tokens", 0
            )
            said = f"{cached} of {again.usage.get('prompt_tokens')} tokens"
            pairs = [(first.first, again.first)]
            rows.append(_told(tier, words, "kill -9", pairs, said))
            rows[-1].append(again.text)
        write_log(server.log)
    return rows


def _fault(server: Server, args: argparse.Namespace, text: str) -> Reply:
    tokens = args.tokens or 48
    server.plan(f"decode:{tokens - 8}:8")
    reply = ask(server, 0, tokens, text=text, seed=1, **USAGE)
    if reply.tokens < tokens - 1:
        row("not answered:", reply.outcome, reply.tokens, "tokens")
    return reply


def _told(
    tier: str, words: int, what: str, pairs: Sequence[tuple[float, float]], disk: str
) -> list[Any]:
    ratios = [wait / read for read, wait in pairs]
    ms = [1e3 * statistics.median(values) for values in zip(*pairs, strict=True)]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    ratio = f"{statistics.median(ratios):.3f}{spread}"
    row(tier, words, what, *[f"{value:.0f} ms" for value in ms], ratio, disk)
    return [tier, words, what, list(pairs), disk]


def speed(args: argparse.Namespace, model: Path) -> list[Any]:
    """Reading and tokens/s of one client, on : off; each prompt is a new one.

    One of 20 tokens is not kept: the tier is idle.
    """
    rows: list[Any] = []
    counts = args.words or [20, 4000, 30000]
    head("prompt", "", "off", "on", "ratio (95 %)", "pairs")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {
            "off": stack.enter_context(start(model, None, PROTECTED)),
            "on": stack.enter_context(start(model, Path(folder), PROTECTED)),
        }
        for words in counts:
            until = time.time() + args.seconds / len(counts)

            def one(server: Server, words: int = words) -> tuple[float, float]:
                reply = ask(server, words, args.tokens or 128)
                if server is servers["on"]:
                    settle(server)  # not while the other one is asked
                return reply.first, _rate(reply)

            found = in_turn(args, until, servers, one)
            for i, what in enumerate(("seconds to the first token", "tokens/s")):
                values = {name: [x[i] for x in found[name]] for name in servers}
                ratios = [
                    b / a for a, b in zip(values["off"], values["on"], strict=True)
                ]
                medians = [f"{statistics.median(v):.3f}" for v in values.values()]
                mean = "{:.3f} ({:.3f} to {:.3f})".format(*interval(ratios))
                row(words, what, *medians, mean, len(ratios))
            rows.append([words, found])
        written = servers["on"].metric("mlx_safe_kv_disk_written_bytes_total")
        row("written", f"{written / 1e9:.1f} GB", "", "", "", "")
    return rows


def _rate(reply: Reply) -> float:
    return (reply.tokens - 1) / (reply.arrivals[-1] - reply.arrivals[0])
