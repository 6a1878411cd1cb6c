"""Tokens per second of the protected server against the stock one.

Both servers run at the same time on the same model and answer in turn, so that
a drift of the machine's speed hits both alike; the ratio is taken pair by pair.
Aim: at least 0.99.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Server

PLAIN = "import mlx_lm.server; mlx_lm.server.main()"


def rate(server: Server, tokens: int, **more: int) -> float:
    """Tokens per second of one answer of exactly ``tokens`` tokens."""
    begin = time.perf_counter()
    answer = server.chat(
        "Write a long story about a ship.",
        timeout=300,
        max_tokens=tokens,
        # No stop token: every answer is as long as the next.
        logit_bias={"2": -100.0, "0": -100.0},
        **more,
    )
    seconds = time.perf_counter() - begin
    produced = answer.json["usage"]["completion_tokens"]
    if produced != tokens:
        raise SystemExit(f"asked for {tokens} tokens, got {produced}")
    return float(tokens / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with (
        Server(args.model, program=PLAIN) as stock,
        Server(args.model) as protected,
    ):
        stock.wait_ready()
        protected.wait_ready()
        for path, more in (("batched", {}), ("sequential", {"seed": 1})):
            report(path, stock, protected, args.pairs, args.tokens, more)


def report(
    path: str,
    stock: Server,
    protected: Server,
    pairs: int,
    tokens: int,
    more: dict[str, int],
) -> None:
    """Measures one path and prints its figures."""
    rate(stock, tokens, **more)
    rate(protected, tokens, **more)
    rows = []
    for i in range(pairs):
        # A B, B A, …: neither always goes first.
        if i % 2:
            ours = rate(protected, tokens, **more)
            rows.append((rate(stock, tokens, **more), ours))
        else:
            theirs = rate(stock, tokens, **more)
            rows.append((theirs, rate(protected, tokens, **more)))
    ratios = [ours / theirs for theirs, ours in rows]
    print(
        f"{path}: stock {statistics.median(r[0] for r in rows):.1f} tokens/s, "
        f"protected {statistics.median(r[1] for r in rows):.1f} tokens/s, ratio "
        f"median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), {pairs} pairs"
    )


if __name__ == "__main__":
    main()
