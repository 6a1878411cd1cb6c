"""What a ceiling costs: growing conversations with one and without.

Prints, for servers under the same load: the peak of MLX's memory over the ceiling,
requests completed per minute, processor time per request, and the share of the prompt
tokens that were not read again. Aims: the peak below the ceiling, and nothing failed.
With ``--kv`` the ceiling once more with KV caches on disk, which keeps blocks of 256
tokens: take turns that are longer. Aims then: 0.95 of the hit rate and of the requests
per minute, 1.1 of the processor time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import tiny_model
from support.server import Server, kept_in
from support.usage import cpu_seconds

TOKENS = 8


@dataclass
class Load:
    """So many clients, each with so many turns of so many words."""

    clients: int
    turns: int
    words: int


@dataclass
class Result:
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    reused_tokens: float = 0.0
    evictions: float = 0.0
    model: float = 0.0
    cpu: float = 0.0

    @property
    def per_minute(self) -> float:
        return 60 * self.completed / self.seconds

    @property
    def hit_rate(self) -> float:
        return self.reused_tokens / self.prompt_tokens

    def over(self, other: Result) -> str:
        cpu = self.cpu / self.completed / (other.cpu / other.completed)
        return (
            f"{self.per_minute / other.per_minute:.2f} of the requests per minute, "
            f"{self.hit_rate / other.hit_rate:.2f} of the hit rate, "
            f"{cpu:.2f} of the CPU"
        )


def converse(server: Server, load: Load, client: int, result: Result) -> None:
    messages = [{"role": "system", "content": "You are terse."}]
    for turn in range(load.turns):
        text = f"client {client} turn {turn} " + "word " * load.words
        messages.append({"role": "user", "content": text})
        answer = server.post({"messages": messages, "max_tokens": TOKENS}, timeout=600)
        if answer.status != 200:
            result.failed += 1
            return
        result.completed += 1
        result.prompt_tokens += answer.json["usage"]["prompt_tokens"]
        messages.append({"role": "assistant", "content": answer.text})


def run(model: Path, load: Load, *flags: str) -> Result:
    """One server under the load."""
    result = Result()
    with Server(model, *flags) as server:
        server.wait_ready()
        threads = [
            threading.Thread(target=converse, args=(server, load, i, result))
            for i in range(load.clients)
        ]
        begin, used = time.perf_counter(), cpu_seconds(server.process.pid)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        result.seconds = time.perf_counter() - begin
        result.cpu = cpu_seconds(server.process.pid) - used
        result.peak = server.metric("mlx_safe_memory_peak_bytes")
        result.reused_tokens = server.metric(
            "mlx_safe_prompt_cache_reused_tokens_total"
        )
        result.evictions = server.metric("mlx_safe_prompt_cache_evictions_total")
        result.model = server.metric("mlx_safe_memory_model_bytes")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the free peak")
    parser.add_argument("--kv", action="store_true", help="with --kv-dir as well")
    args = parser.parse_args()
    load = Load(args.clients, args.turns, args.words)
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model.make(Path(directory) / "model")
        free = run(model, load)
        ceiling = int(args.share * free.peak)
        limit = ("--max-active-memory-bytes", str(ceiling))
        runs = {"without": free, "with": run(model, load, *limit)}
        if args.kv:
            kept = kept_in(f"{directory}/kv")
            runs["on disk"] = run(model, load, *limit, *kept)
    print(f"ceiling {ceiling / 1e6:.1f} MB, {args.share:.2f} of the peak without it")
    for name, found in runs.items():
        print(
            f"{name:8} peak {found.peak / ceiling:.2f} of the ceiling, "
            f"{found.per_minute:.0f} requests per minute, {found.failed} failed, "
            f"{found.hit_rate:.0%} of the prompt tokens not read again, "
            f"{found.cpu / max(1, found.completed):.2f} s of CPU each"
        )
        if found is not free:
            print(f"ratio    {found.over(free)}")


if __name__ == "__main__":
    main()
