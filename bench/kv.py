"""What KV caches on disk are worth: the same server with --kv-dir and without.

Prints for both, in time and in processor time of the server: the next token after a
fault for want of memory over the first reading of its prompt. The same for the next
turn's first token after kill -9. Then the bytes written over the bytes of new KV of
a conversation. With ``--broken-off`` the tokens that are read twice when a fault
comes in the midst of a prompt, with ``--speed`` what the idle tier costs an answer.
With ``--kills N`` a server is killed N times at random moments under load, with a
directory far below it; no answer may differ. With ``--ceiling`` growing conversations
under a ceiling, a third of what they take without one, or less, so that the prompt
cache evicts; over the same without a ceiling.

Aims, with a model whose reading costs something: 0.15 (0.05 at 4,000 tokens), 0.15,
1.10, a block and a step, 0.99, and no other answer. Under a ceiling 0.95 of the hit
rate and of the requests per minute, 1.1 of the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from memory_ceiling import Load, Result
from memory_ceiling import run as run_load
from spread import interval

from support import tiny_model
from support.model_types import load_type
from support.models import make_model
from support.server import CONTROLLED, NEVER, Server, kept_in
from support.usage import cpu_seconds

TIMEOUT_S = 3600


def start(model: Path, directory: Path | None, size: str = "20G") -> Server:
    # A step may take minutes on a busy machine.
    arguments = ["--prefill-step-size", "256", "--stall-timeout", "0"]
    if directory is not None:
        arguments += [*kept_in(directory), "--kv-disk-bytes", size]
    return Server(model, *arguments, program=CONTROLLED, inject=f"any:{NEVER}")


def text_of(words: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.randrange(1000)} ships" for _ in range(words))


def body_of(
    server: Server, messages: list[dict[str, str]], tokens: int
) -> dict[str, Any]:
    name = str(server.model)  # some servers want to hear it
    body = {"model": name, "messages": messages, "max_tokens": tokens}
    return {**body, "temperature": 0.0}


def ask(server: Server, messages: list[dict[str, str]], tokens: int = 1) -> Any:
    body = body_of(server, messages, tokens)
    answer = server.post(body, timeout=TIMEOUT_S)
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.json}")
    return answer


def settle(server: Server, on: bool) -> None:
    time.sleep(0.3)
    while on and server.metric("mlx_safe_kv_disk_waiting_bytes") > 0:
        time.sleep(0.05)


@dataclass
class Moment:
    """When something was seen: seconds, and processor seconds of the server."""

    wall: float
    cpu: float

    def since(self, other: Moment) -> Moment:
        return Moment(self.wall - other.wall, self.cpu - other.cpu)

    def over(self, other: Moment) -> str:
        return (
            f"{self.wall / other.wall:.3f} of the time ({other.wall:.2f} s -> "
            f"{self.wall:.2f} s), {self.cpu / other.cpu:.3f} of the CPU "
            f"({other.cpu:.2f} s -> {self.cpu:.2f} s)"
        )


def now(server: Server) -> Moment:
    return Moment(time.monotonic(), cpu_seconds(server.process.pid))


def streamed(
    server: Server, messages: list[dict[str, str]], tokens: int, alone: bool = False
) -> tuple[list[Moment], str, dict[str, Any]]:
    """The moments from the asking on to each token; the text; its usage."""
    body = body_of(server, messages, tokens)
    body |= {"seed": 1} if alone else {}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    moments, text = [now(server)], ""
    usage: dict[str, Any] = {}
    connection = server.connect(TIMEOUT_S)
    path, data = "/v1/chat/completions", json.dumps(body)
    # Some servers read no JSON without being told that it is.
    connection.request("POST", path, data, headers=server.headers)
    with connection.getresponse() as response:
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {response.read()[:500]!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if choice["delta"].get("content"):
                    moments.append(now(server))
                    text += choice["delta"]["content"]
    connection.close()
    return moments, text, usage


def lives(
    model: Path, directory: Path | None, words: int, seed: int, alone: bool
) -> None:
    """One conversation: a fault for want of memory in it, and then a kill.

    alone: on mlx-lm's sequential path, where memory has nothing of a prompt before its
    answer has ended.
    """
    kind = "off" if directory is None else "on"
    messages = [{"role": "user", "content": text_of(words, seed)}]
    with start(model, directory) as server:
        server.wait_ready()
        ask(server, [{"role": "user", "content": "warm up"}])
        server.plan("decode:6:8")
        moments, text, usage = streamed(server, messages, 12, alone)
        read = moments[1].since(moments[0])
        gaps = [b.since(a) for a, b in itertools.pairwise(moments[1:])]
        after = max(gaps, key=lambda gap: gap.wall)
        print(
            f"tier {kind}, {usage['prompt_tokens']} tokens: fault for want of memory "
            f"-> next token / reading: {after.over(read)}",
            flush=True,
        )
        settle(server, directory is not None)
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "go on"},
    ]
    with start(model, directory) as server:
        server.wait_ready()
        ask(server, [{"role": "user", "content": "warm up"}])
        moments, _, usage = streamed(server, messages, 1)
        again = moments[1].since(moments[0])
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    print(
        f"tier {kind}: after kill -9, the next turn's first token / reading: "
        f"{again.over(read)}; {cached} of {usage['prompt_tokens']} tokens not read",
        flush=True,
    )


def broken_off(model: Path, directory: Path, words: int, seed: int) -> str:
    """A fault in the midst of a prompt: what is read again."""
    step = 256
    with start(model, directory) as server:
        server.wait_ready()
        total = words * 9 // step  # steps, about; a word and its number are 9 bytes
        server.plan(f"prefill:{total // 2}:8")
        _, _, usage = streamed(
            server, [{"role": "user", "content": text_of(words, seed)}], 1
        )
        restored = server.metric("mlx_safe_kv_disk_restored_tokens_total")
    lost = total // 2 * step - restored
    return (
        f"{lost:.0f} tokens of {usage['prompt_tokens']} read twice (a fault in step "
        f"{total // 2} of {step} tokens; {restored:.0f} came from disk)"
    )


def speed(
    model: Path, directory: Path, words: int, tokens: int, pairs: int, writing: bool
) -> None:
    """Three servers at once, asked in turn: with the tier, and two without.

    Those two tell how well it is known. The interval is one of the median, at 95 %.

    Args:
        writing: a new text each time, which is read, written and answered; all of
            the processor time counts. Otherwise the tier has nothing to write.
    """
    with (
        start(model, None) as off,
        start(model, None) as again,
        start(model, directory) as on,
    ):
        servers = [off, again, on]
        for server in servers:
            ask(server.wait_ready(), [{"role": "user", "content": text_of(words, 1)}])
        settle(on, True)
        ratios: dict[Server, list[float]] = {again: [], on: []}
        for n in range(pairs):
            used = {}
            seed = 2 + n if writing else 1
            messages = [{"role": "user", "content": text_of(words, seed)}]
            for server in servers[n % 3 :] + servers[: n % 3]:
                moments, _, _ = streamed(server, messages, tokens)
                if writing:
                    settle(server, server is on)
                    used[server] = now(server).since(moments[0]).cpu
                else:
                    used[server] = moments[-1].since(moments[1]).cpu
            for server, found in ratios.items():
                found.append(used[off] / used[server])
            settle(on, True)
            if n % 10 == 9 or n == pairs - 1:
                print(
                    f"tokens per CPU second over those of tier off, of {n + 1}: tier "
                    f"{'writing' if writing else 'idle'} {median_of(ratios[on])}; "
                    f"off, another server {median_of(ratios[again])}",
                    flush=True,
                )


def median_of(ratios: list[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval(ratios))


def written(model: Path, directory: Path, words: int, turns: int) -> str:
    """Bytes written over bytes that are new.

    New are the slots of each token, those of windows too, and what a state has become
    at the end of each turn: all of its bytes are others then.
    """
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
    blocks = [f.stat().st_size for f in directory.glob("*/b-*.kv")]
    snapshots = [f.stat().st_size for f in directory.glob("*/s-*.kv")]
    said = f"{size / 1e6:.1f} MB, {total} tokens, {turns} turns"
    said += f"; {len(blocks)} blocks there, {sum(blocks) / 1e6:.1f} MB"
    said += f"; {len(snapshots)} snapshots there, {sum(snapshots) / 1e6:.1f} MB"
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    slot = statistics.median(blocks) / 256 if blocks else 0.0
    new = total * slot
    ratios = [f"{size / new:.3f} of the slots that only grow"] if blocks else []
    if snapshots:
        # What a snapshot has of slots that only grow is half a block, in the mean.
        state = max(0.0, statistics.median(snapshots) - 128 * slot)
        kind = load_type(config["model_type"]).ModelArgs  # has what it does not say
        window = config.get("sliding_window", getattr(kind, "sliding_window", None))
        new += total * state / window if window else turns * state
        ratios.append(f"{size / new:.3f} of the slots, and windows' or states")
    return f"{', '.join(ratios)} ({said})"


def ceiling(model: Path, directory: Path, load: Load) -> None:
    free = run_load(model, load)
    share = 1 / 3
    while True:
        size = int(free.model + share * (free.peak - free.model))
        limit = ("--max-active-memory-bytes", str(size))
        off = run_load(model, load, *limit)
        # Not by evictions: there is a limit to their number, too, without any ceiling.
        if off.hit_rate < 0.9 * free.hit_rate:
            break
        if (share := share * 0.8) < 0.02:
            raise SystemExit("no ceiling makes the prompt cache evict: a larger load")
    print(
        f"ceiling: the model and {share:.2f} of what else was held without", flush=True
    )
    on = run_load(model, load, *limit, "--kv-dir", str(directory))
    found: Result
    for name, found in (("none", free), ("tier off", off), ("tier on", on)):
        print(
            f"{name:8} {found.evictions:.0f} evictions, {found.failed} failed, hit "
            f"rate {found.hit_rate:.2f}; over none: {found.over(free)}",
            flush=True,
        )


def kills(
    model: Path, directory: Path, words: int, times: int, seed: int, room: float
) -> str:
    """Two clients, six texts, for a part of which there is room on disk."""
    chance = random.Random(seed)
    texts = [text_of(words, n) for n in range(6)]
    with start(model, directory) as server:
        server.wait_ready()
        expected = [
            ask(server, [{"role": "user", "content": t}], 8).text for t in texts
        ]
        settle(server, True)
        limit = int(server.metric("mlx_safe_kv_disk_bytes") * room)
    seen: list[bool] = []
    refused: list[int] = []
    over = restored = suspects = 0
    for n in range(times):
        with start(model, directory, str(limit)) as server:
            server.wait_ready()
            done = threading.Event()

            def load(server: Server = server, done: threading.Event = done) -> None:
                while not done.is_set():
                    n = chance.randrange(len(texts))
                    body = {
                        "messages": [{"role": "user", "content": texts[n]}],
                        "max_tokens": 8,
                        "temperature": 0.0,
                    }
                    try:
                        answer = server.post(body, timeout=TIMEOUT_S)
                    except OSError:
                        return  # it has been killed
                    if answer.status is None or answer.broken:
                        return
                    if answer.status == 200:
                        seen.append(answer.text == expected[n])
                    else:
                        refused.append(answer.status)

            clients = [threading.Thread(target=load, daemon=True) for _ in range(2)]
            for thread in clients:
                thread.start()
            time.sleep(chance.uniform(0.0, 6.0))
            restored += int(server.metric("mlx_safe_kv_disk_restored_total"))
            suspects += int(server.metric("mlx_safe_kv_disk_suspects_total"))
            done.set()
            os.kill(server.process.pid, signal.SIGKILL)
            server.wait()
            for thread in clients:
                thread.join(60)
        size = sum(f.stat().st_size for f in directory.glob("*/*.kv"))
        over += size > limit
        if n % 10 == 9 or n == times - 1:
            print(
                f"{n + 1} kills of servers (seed {seed}, limit {limit} bytes): "
                f"{len(seen)} answers, {seen.count(False)} wrong, statuses but 200: "
                f"{refused}, {restored} restored, "
                f"{over} over the limit, {suspects} files of dead restores removed",
                flush=True,
            )
    return "nothing wrong" if all(seen) and not refused and not over else "WRONG"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    parser.add_argument("--words", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20, help="0: none")
    parser.add_argument("--hidden", type=int, default=256, help="of the random one")
    parser.add_argument("--alone", action="store_true", help="the sequential path")
    parser.add_argument("--only-on", action="store_true", help="not without the tier")
    parser.add_argument("--broken-off", type=int, default=0, metavar="WORDS")
    parser.add_argument("--tokens", type=int, default=200, help="of --speed")
    parser.add_argument("--speed", type=int, default=0, metavar="PAIRS")
    parser.add_argument("--writing", action="store_true", help="--speed of new texts")
    parser.add_argument("--kind", help="a type of models, with random weights")
    parser.add_argument("--ceiling", action="store_true")
    parser.add_argument("--clients", type=int, default=10, help="of --ceiling")
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument(
        "--room", type=float, default=1 / 3, help="--kills: the limit, of all texts"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        model = options.model or tiny_model.make(
            made / "model", hidden_size=options.hidden
        )
        if options.kind:
            named = (str(model), options.kind)
            model = make_model("model_types.py", made / "kinds", *named) / options.kind
        for n in range(options.rounds):
            kinds = ["on"] if options.only_on else ["off", "on"]
            for kind in kinds if n % 2 == 0 else kinds[::-1]:
                directory = made / f"{n}" if kind == "on" else None
                lives(model, directory, options.words, n, options.alone)
        if options.broken_off:
            print(broken_off(model, made / "broken", options.broken_off, 7), flush=True)
        if options.speed:
            pairs, tokens = options.speed, options.tokens
            directory = made / "speed"
            speed(model, directory, options.words, tokens, pairs, options.writing)
        if options.ceiling:
            load = Load(options.clients, 4, options.words)
            ceiling(model, made / "ceiling", load)
        if options.turns:
            share = options.words // 8
            found_written = written(model, made / "turns", share, options.turns)
            print("written / new:", found_written, flush=True)
        if options.kills:
            times = options.kills
            given = (options.words, times, options.seed, options.room)
            found_kills = kills(model, made / "kills", *given)
            print(found_kills, flush=True)


if __name__ == "__main__":
    main()
