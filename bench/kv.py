"""What KV caches on disk are worth: the same server with --kv-dir and without.

Prints, in turn for both: the next turn's first token after kill -9 over the first
reading of its prompt; the next token after a fault for want of memory over the same;
the bytes written over the bytes of new KV of a conversation. With ``--kills N`` a
server is killed N times at random moments under load; no answer may differ.

Aims, with a model whose reading costs something: 0.15, 0.15, 1.10, and no other answer.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import tiny_model
from support.server import CONTROLLED, NEVER, Server

TIMEOUT_S = 3600


def start(model: Path, directory: Path | None) -> Server:
    arguments = ["--prefill-step-size", "256"]
    if directory is not None:
        arguments += ["--kv-dir", str(directory)]
    return Server(model, *arguments, program=CONTROLLED, inject=f"any:{NEVER}")


def text_of(words: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.randrange(1000)} ships" for _ in range(words))


def ask(server: Server, messages: list[dict[str, str]], tokens: int = 1) -> Any:
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0.0}
    answer = server.post(body, timeout=TIMEOUT_S)
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.json}")
    return answer


def timed(server: Server, messages: list[dict[str, str]]) -> tuple[float, Any]:
    begun = time.monotonic()
    answer = ask(server, messages)
    return time.monotonic() - begun, answer


def settle(server: Server, on: bool) -> None:
    time.sleep(0.3)
    while on and server.metric("mlx_safe_kv_disk_waiting_bytes") > 0:
        time.sleep(0.05)


def after_kill(model: Path, directory: Path | None, words: int, seed: int) -> str:
    messages = [{"role": "user", "content": text_of(words, seed)}]
    with start(model, directory) as server:
        server.wait_ready()
        ask(server, [{"role": "user", "content": "warm up"}])
        read, answer = timed(server, messages)
        settle(server, directory is not None)
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "go on"},
    ]
    with start(model, directory) as server:
        server.wait_ready()
        ask(server, [{"role": "user", "content": "warm up"}])
        again, answer = timed(server, messages)
    usage = answer.json["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    total = usage["prompt_tokens"]
    return f"{again / read:.3f} ({read:.2f} s -> {again:.2f} s; {cached} of {total})"


def out_of_memory(model: Path, directory: Path | None, words: int, seed: int) -> str:
    messages = [{"role": "user", "content": text_of(words, seed)}]
    with start(model, directory) as server:
        server.wait_ready()
        ask(server, [{"role": "user", "content": "warm up"}])
        read, _ = timed(server, messages)
        settle(server, directory is not None)
        # Without a fault the rest is a token or two; with it a whole reading.
        server.plan("any:1:8")
        again, _ = timed(server, messages)
    return f"{again / read:.3f} ({read:.2f} s -> {again:.2f} s)"


def written(model: Path, directory: Path, words: int, turns: int) -> str:
    messages: list[dict[str, str]] = []
    with start(model, directory) as server:
        server.wait_ready()
        for turn in range(turns):
            messages.append({"role": "user", "content": text_of(words, turn)})
            answer = ask(server, messages, 4)
            messages.append({"role": "assistant", "content": answer.text})
        settle(server, True)
        total = answer.json["usage"]["prompt_tokens"] + 4
        size = server.metric("mlx_safe_kv_disk_written_bytes_total")
        files = server.metric("mlx_safe_kv_disk_written_total")
    new = total / 256 * size / files
    return f"{size / new:.3f} ({size / 1e6:.1f} MB, {total} tokens, {turns} turns)"


def kills(model: Path, directory: Path, words: int, times: int, seed: int) -> str:
    chance = random.Random(seed)
    texts = [text_of(words, n) for n in range(4)]
    with start(model, None) as server:
        server.wait_ready()
        expected = [
            ask(server, [{"role": "user", "content": t}], 8).text for t in texts
        ]
    wrong = answered = 0
    for _ in range(times):
        with start(model, directory) as server:
            server.wait_ready()
            done = threading.Event()

            def load(server: Server = server, done: threading.Event = done) -> None:
                nonlocal wrong, answered
                while not done.is_set():
                    n = chance.randrange(len(texts))
                    messages = [{"role": "user", "content": texts[n]}]
                    try:
                        answer = ask(server, messages, 8)
                    except (OSError, SystemExit, ValueError, KeyError):
                        return
                    answered += 1
                    wrong += answer.text != expected[n]

            thread = threading.Thread(target=load, daemon=True)
            thread.start()
            time.sleep(chance.uniform(0.0, 3.0))
            os.kill(server.process.pid, signal.SIGKILL)
            done.set()
            server.wait()
            thread.join(60)
    return f"{times} kills, {answered} answers, {wrong} wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    parser.add_argument("--words", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        model = options.model or tiny_model.make(made / "model", hidden_size=256)
        for n in range(options.rounds):
            for name, measure in (
                ("after kill -9", after_kill),
                ("after out of memory", out_of_memory),
            ):
                for kind in ("off", "on") if n % 2 == 0 else ("on", "off"):
                    directory = made / f"{n}-{name}" if kind == "on" else None
                    found = measure(model, directory, options.words, n)
                    print(f"{name}, tier {kind}: {found}", flush=True)
        share = options.words // 8
        print("written / new:", written(model, made / "turns", share, options.turns))
        if options.kills:
            times = options.kills
            print(kills(model, made / "kills", options.words, times, 16), flush=True)


if __name__ == "__main__":
    main()
