"""Growing conversations of many types of models that live on disk: who fails, and how.

For each type a server with --kv-dir and room for two conversations in memory. Clients
hold conversations of their own, in batches and alone, streamed or not, and leave now
and then in the midst of a prompt. The limit of the directory is below what they write.
A request that fails in spite of that, a line of the log that tells of a failure, a
tier that is off: all of it is wrong, and printed with the log's lines. With
``--faults S`` a fault comes every S seconds or so, of a kind after which requests are
run again: they are not to fail, but with the fault's own error after too many of them.

    bench/kv_kinds.py --seconds 60 qwen3_next falcon_h1 gemma3_text
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import tiny_model
from support.models import make_model
from support.server import CONTROLLED, Server, kept_in

TROUBLE = ("Traceback", "no longer kept")
SAYS = (*TROUBLE, "read again, after", "step failed", "ends alone")
# A timeout, an innocent victim, out of memory, an interactivity watchdog.
CODES = (0x2, 0x5, 0x8, 0xE)
WORDS = ["ships", "sail", "slowly", "over", "the", "grey", "sea", "at", "night"]


def converse(server: Server, seed: int, until: float, seen: Counter[str]) -> None:
    chance = random.Random(seed)
    system = {"role": "system", "content": "You are terse. " * 20}
    messages: list[dict[str, str]] = []
    while time.monotonic() < until:
        if not messages or len(messages) > 8:
            messages = [system]
        words = " ".join(chance.choices(WORDS, k=chance.randrange(1, 90)))
        messages.append({"role": "user", "content": words})
        body = {
            "messages": messages,
            "max_tokens": chance.randrange(1, 40),
            "temperature": 0.0,
            "stream": chance.random() < 0.3,
            **({"seed": 1} if chance.random() < 0.4 else {}),
        }
        if chance.random() < 0.1:
            with server.connected(body):
                time.sleep(chance.random() / 2)
            seen["left"] += 1
            messages.pop()
            continue
        answer = server.post(body, timeout=300)
        seen[f"{answer.status} {answer.broken or ''}".strip()] += 1
        if str((answer.error or {}).get("code")).startswith("metal_"):
            seen["left to its faults"] += 1
            messages.pop()
            continue
        if answer.status != 200 or answer.error:
            seen[f"error {answer.error}"] += 1
            return
        messages.append({"role": "assistant", "content": answer.text})


def disturb(server: Server, seed: int, until: float, every: float) -> None:
    chance = random.Random(seed)
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, chance.uniform(0.5, 1.5) * every))
        phase = chance.choice(["prefill", "decode", "any"])
        server.plan(f"{phase}:{chance.randrange(1, 8)}:{chance.choice(CODES)}")


def run(model: Path, directory: Path, seconds: float, seed: int, faults: float) -> bool:
    flags = ["--prefill-step-size", "64", "--prompt-cache-size", "2"]
    flags += [*kept_in(directory), "--kv-disk-bytes", "6M"]
    seen: Counter[str] = Counter()
    with Server(model, *flags, program=CONTROLLED) as server:
        server.wait_ready()
        until = time.monotonic() + seconds
        clients = [
            threading.Thread(target=converse, args=(server, seed + n, until, seen))
            for n in range(4)
        ]
        if faults:
            given = (server, seed, until, faults)
            clients.append(threading.Thread(target=disturb, args=given))
        for client in clients:
            client.start()
        for client in clients:
            client.join(seconds + 300)
        on = server.metric("mlx_safe_kv_disk_on")
        counts = {
            name: int(server.metric(f"mlx_safe_kv_disk_{name}_total"))
            for name in ("restored", "written", "evicted", "damaged")
        }
        counts["replays"] = int(server.metric("mlx_safe_replays_total"))
    lines = server.log.splitlines()
    says = TROUBLE if faults else SAYS
    told = [i for i, line in enumerate(lines) if any(s in line for s in says)]
    good = ("200", "left", *(("503",) if faults else ()))
    wrong = bool(told) or not on or any(not k.startswith(good) for k in seen)
    print(
        f"{model.name} (seed {seed}): {'WRONG' if wrong else 'nothing wrong'}; "
        f"{dict(seen)}, {counts}",
        flush=True,
    )
    if wrong:
        print("\n".join(lines[max(0, told[0] - 2) : told[0] + 60] if told else lines))
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", metavar="TYPE")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each type")
    parser.add_argument("--faults", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_model.make(Path(folder) / "model")
        for kind in options.kinds:
            made = make_model("model_types.py", Path(folder) / kind, str(base), kind)
            directory = Path(folder) / f"kv-{kind}"
            given = (options.seconds, options.seed, options.faults)
            good &= run(made / kind, directory, *given)
    sys.exit(not good)


if __name__ == "__main__":
    main()
