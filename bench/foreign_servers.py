"""Processor time for each token: the protected server beside servers of others.

``python bench/foreign_servers.py [NAME ...]``, of tests/servers/peers.py; they must be
installed (`make test-servers`). Both run at once, and answer the same requests in
turns, with a tiny random model: it is the servers that are compared, not the model.
Linux: it reads ``/proc``.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "servers")]

import peers  # noqa: E402

from support.models import make_model  # noqa: E402
from support.server import Server  # noqa: E402

ROUNDS = 5
TOKENS = 300
STREAMS = 4


def seconds(pid: int) -> float:
    """Processor time of a process and its children that have ended, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def one_stream(server: Server, i: int) -> None:
    body = {
        "model": str(server.model),
        "messages": [{"role": "user", "content": f"tell me {i}"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    answer = server.post(body, timeout=300)
    assert answer.status == 200 and answer.broken is None, answer


def load(server: Server, streams: int, salt: int) -> float:
    """Milliseconds of processor time for a token."""
    import threading

    began = seconds(server.process.pid)
    threads = [
        threading.Thread(target=one_stream, args=(server, 100 * salt + i))
        for i in range(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1e3 * (seconds(server.process.pid) - began) / (streams * TOKENS)


def compare(peer: peers.Peer, model: Path, work: Path) -> None:
    ours = Server(model, env={"HF_HUB_OFFLINE": "1"})
    with ours.wait_ready(), peers.running(peer, "alone", model, work) as theirs:
        for streams in (1, STREAMS):
            found: list[tuple[float, float]] = []
            for i in range(ROUNDS + 1):
                pair = load(ours, streams, i), load(theirs, streams, i)
                found += [pair] if i else []  # the first is warm-up
            ratios = sorted(a / b for a, b in found)
            mine, other = (statistics.median(x) for x in zip(*found, strict=True))
            print(
                f"{peer.versions}, {streams} streams: ours {mine:.2f} ms a token, "
                f"theirs {other:.2f}; x {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    asked = sys.argv[1:] or [p.name for p in peers.PEERS]
    with tempfile.TemporaryDirectory() as directory:
        made = make_model("../servers/tiny_qwen3.py", Path(directory) / "model")
        for peer in peers.PEERS:
            if peer.name in asked and peer.is_installed:
                compare(peer, made, Path(directory) / peer.name)
            elif peer.name in asked:
                print(f"did not run: {peer.name}: it is not installed")
