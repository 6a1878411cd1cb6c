"""What HTTP/1.1 costs: this server against an earlier one, in pairs.

``--before`` is a directory with the package ``mlx_safe`` as it was, complete with its
native part. Both servers run at the same time on the same model and answer in turn.
Three figures: tokens per second of a stream, on a connection that is kept, if the
server keeps any. Seconds to the first event of a short stream. Seconds to the first
byte of a short answer without a stream. Aims: at least 1.0, and at most 1.0.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import Server

LIMIT_S = 300


class Client:
    """Keeps its connection if the server lets it."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", server.port, timeout=LIMIT_S
        )

    def ask(self, tokens: int, stream: bool) -> tuple[float, float, int]:
        """(seconds to the first event or byte, seconds in all, events)."""
        body = {
            "messages": [{"role": "user", "content": "Write a story about a ship."}],
            "max_tokens": tokens,
            "stream": stream,
            # No stop token: every answer is as long as the next.
            "logit_bias": {"2": -100.0, "0": -100.0},
        }
        begin = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = self._connection.getresponse()
        first, events = 0.0, 0
        if not stream:
            response.read(1)
            first = time.perf_counter() - begin
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                events += 1
        response.read()  # or http.client does not know that it is at its end
        return first, time.perf_counter() - begin, events


def figures(client: Client, tokens: int) -> dict[str, float]:
    """What one server does, once."""
    _, seconds, events = client.ask(tokens, True)
    if events < tokens // 4:
        raise SystemExit(f"asked for {tokens} tokens, got {events} events")
    return {
        "tokens/s of a stream": tokens / seconds,
        "s to the first event of a stream": client.ask(1, True)[0],
        "s to the first byte of a short answer": client.ask(1, False)[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--before", required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    path: dict[str, Any] = {"env": {"PYTHONPATH": args.before}}
    with (
        Server(args.model, **path).wait_ready() as earlier,
        Server(args.model).wait_ready() as now,
    ):
        clients = Client(earlier), Client(now)
        for client in clients:
            figures(client, args.tokens)
        rows = []
        for i in range(args.pairs):
            # A B, B A, …: neither always goes first.
            order = clients if i % 2 else clients[::-1]
            found = {client: figures(client, args.tokens) for client in order}
            rows.append((found[clients[0]], found[clients[1]]))
    for name in rows[0][0]:
        ratios = [new[name] / old[name] for old, new in rows]
        print(
            f"{name}: before {statistics.median(old[name] for old, _ in rows):.4g}, "
            f"now {statistics.median(new[name] for _, new in rows):.4g}, ratio median "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to "
            f"{max(ratios):.3f}), {args.pairs} pairs"
        )


if __name__ == "__main__":
    main()
