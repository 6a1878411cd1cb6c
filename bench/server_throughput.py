"""Tokens per second of the protected server against the stock one, or another commit's.

Both servers run at the same time on the same model and answer in turn, so that
a drift of the machine's speed hits both alike. The ratio is taken pair by pair.
Aim: at least 0.99.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from spread import interval

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
    parser.add_argument(
        "--before",
        metavar="DIR",
        help="not stock: the commit whose wheel `pip install --target` put there",
    )
    args = parser.parse_args()
    if args.before:
        name = "before"
        other = Server(args.model, env={"PYTHONPATH": args.before})
    else:
        name, other = "stock", Server(args.model, program=PLAIN)
    with other, Server(args.model) as protected:
        other.wait_ready()
        protected.wait_ready()
        for path, more in (("batched", {}), ("sequential", {"seed": 1})):
            report(path, name, other, protected, args.pairs, args.tokens, more)


def report(
    path: str,
    name: str,
    other: Server,
    protected: Server,
    pairs: int,
    tokens: int,
    more: dict[str, int],
) -> None:
    """Measures one path and prints its figures."""
    rate(other, tokens, **more)
    rate(protected, tokens, **more)
    rows = []
    for i in range(pairs):
        # A B, B A, …: neither always goes first.
        if i % 2:
            ours = rate(protected, tokens, **more)
            rows.append((rate(other, tokens, **more), ours))
        else:
            theirs = rate(other, tokens, **more)
            rows.append((theirs, rate(protected, tokens, **more)))
    ratios = [ours / theirs for theirs, ours in rows]
    median, low, high = interval(ratios)
    print(
        f"{path}: {name} {statistics.median(r[0] for r in rows):.1f} tokens/s, "
        f"protected {statistics.median(r[1] for r in rows):.1f} tokens/s, ratio "
        f"median {median:.3f} ({low:.3f} to {high:.3f}, 95 %), {pairs} pairs",
        flush=True,
    )


if __name__ == "__main__":
    main()
