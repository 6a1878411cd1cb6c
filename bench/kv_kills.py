"""Kills what writes KV caches, at random moments, and looks at what is left.

A child writes and restores blocks and snapshots of random texts in a directory whose
limit is far below them, two at a time, until it is killed (SIGKILL). Then a new one
opens the directory: every byte that it gives out must be right, nothing half-written
may be left, and the limit must hold. No MLX is needed; with a server, and its text:
``bench/kv.py --kills``.

Prints the seed; ends with status 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mlx_safe.kv.directory import Directory
from mlx_safe.kv.store import Limits
from mlx_safe.kv.writer import Writer
from support.kv_files import IDENTITY, drafts, on_disk, opened, restored

LIMIT = 60 * 4096  # of the directory; all texts together have ten times as much
TEXTS = 24
MOST = 2600  # tokens of a text


def text(n: int) -> list[int]:
    """The text ``n``; half of them begin alike."""
    chance = random.Random(n)
    start = list(range(600)) if n % 2 else []
    return start + [chance.randrange(1000) for _ in range(chance.randrange(300, MOST))]


def work(path: Path, seed: int) -> None:
    """What is killed."""
    chance = random.Random(seed)
    store = opened(path, Limits(LIMIT, free=0))
    writer = Writer(store)
    writer.start()
    print("working", flush=True)
    while True:
        tokens = text(chance.randrange(TEXTS))
        found = store.find(IDENTITY, tokens, len(tokens), blocks=True, states=False)
        mark = (
            store.begin_restore(found.nodes)
            if found and chance.random() < 0.3
            else None
        )
        restored(store, tokens)
        for draft in drafts(tokens, snapshot=chance.random() < 0.5):
            writer.offer(draft, 1)
        writer.confirm(1)
        if chance.random() < 0.1:
            writer.fail(all_of_it=chance.random() < 0.5)
        if mark is not None:
            store.end_restore(mark)
        writer.flush(5)
        if store.off is not None:
            print(f"off: {store.off}", flush=True)
            return


def look(path: Path) -> tuple[int, list[str]]:
    """(tokens that are restored of all texts, what is wrong)."""
    wrong = []
    store = opened(path, Limits(LIMIT, free=0))
    tokens = 0
    for n in range(TEXTS):
        for states in (False, True):
            try:
                nodes = restored(store, text(n), states=states)
            except AssertionError as e:
                wrong.append(f"text {n}: {e}")
                continue
            tokens += nodes[-1].end if nodes else 0
    if store.off is not None:
        wrong.append(f"off: {store.off}")
    if (size := on_disk(path)) > LIMIT:
        wrong.append(f"{size} bytes, over the limit of {LIMIT}")
    if left := list(path.glob("*/tmp-*")):
        wrong.append(f"left: {left[0].name}")
    if store.events["damaged"]:
        wrong.append(f"{store.events['damaged']} damaged files")
    store.close()
    return tokens, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.seed)
        return
    print(f"seed {options.seed}", flush=True)
    chance = random.Random(options.seed)
    kept, wrong = 0, []
    environment = {**os.environ, "MLX_SAFE_AUTOINSTALL": "0"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kv"
        Directory(path).close()
        for n in range(options.kills):
            children = [
                subprocess.Popen(
                    [
                        sys.executable,
                        __file__,
                        "--work",
                        str(path),
                        "--seed",
                        str(seed),
                    ],
                    stdout=subprocess.PIPE,
                    env=environment,
                )
                for seed in (chance.randrange(1 << 30) for _ in range(2))
            ]
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == b"working\n"
            time.sleep(chance.uniform(0.0, 0.4))
            for child in children:
                child.send_signal(signal.SIGKILL)
                if child.wait() != -signal.SIGKILL:
                    wrong.append(f"kill {n}: status {child.returncode}")
            tokens, found = look(path)
            kept += tokens
            wrong += [f"kill {n}: {what}" for what in found]
            if (n + 1) % 20 == 0:
                print(f"{n + 1} kills, {len(wrong)} wrong", flush=True)
    print(f"{options.kills} kills of two processes, {kept} tokens restored after them")
    print("\n".join(wrong) or "nothing wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
