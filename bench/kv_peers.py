"""The next turn after kill -9, of this server and of others with a tier on disk.

The same model, prompt and machine. A server answers a long prompt; then it is killed
and started again with its files, and once more with none. Of both the time to the first
token of the next turn, its text, and how many tokens the server says it did not read.

    bench/kv_peers.py --peer vllm-mlx=PATH/bin/vllm-mlx [--model DIR] [--words 500]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kv import ask, streamed, text_of

from support import tiny_model
from support.server import PYTHON, Server, free_port

START_S = 240

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Kind:
    """What one is started with, with its tier and without.

    names: a request gives the model's name, not its path.
    """

    command: Sequence[str]
    tier: Sequence[str]
    none: Sequence[str] = ()
    names: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


SERVE = ("{program}", "serve")
MTPLX = ("--no-mtp", "--unsafe-force-unverified", "--yes", "--no-auth")
KINDS = {
    "mlx-safe": Kind(
        ("{program}", "-m", "mlx_safe", "serve", "--model", "{model}"),
        ("--kv-dir", "{work}", "--kv-free-bytes", "0"),
    ),
    "vllm-mlx": Kind(
        (*SERVE, "{model}", "--continuous-batching"), ("--ssd-cache-dir", "{work}")
    ),
    "flyto-mlx": Kind(
        (*SERVE, "--model-dir", "{models}"),
        ("--paged-ssd-cache-dir", "{work}"),
        ("--no-cache",),
        names=True,
    ),
    # On Linux it needs some functions of a Mac's libSystem, as in tests/servers.
    "mtplx": Kind(
        (*SERVE, "--model", "{model}", *MTPLX),
        ("--ssd-session-cache-dir", "{work}"),
        ("--ssd-session-cache", "off"),
        env={
            "MLX_SAFE_TEST_LIBSYSTEM": "1",
            "MLX_SAFE_TEST_PLAN": "/nonexistent/plan",  # no faults
            "PYTHONPATH": str(ROOT / "tests/servers/startup"),
        },
    ),
}


class Peer(Server):
    """One of them in a child process. Its files are in ``work``/kv."""

    def __init__(self, kind: Kind, tier: bool, program: str, model: Path, work: Path):
        self.model = Path(model.name) if kind.names else model
        self.tls = None
        self.headers = {"Content-Type": "application/json"}
        self.port = free_port()
        models = work / "models"  # with nothing else in it
        if not models.exists():
            shutil.copytree(model, models / model.name)
        given = {"program": program, "model": model, "models": models}
        given |= {"work": work / "kv"}
        flags = [*(kind.tier if tier else kind.none), "--port", str(self.port)]
        path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, **kind.env, "HF_HUB_OFFLINE": "1", "HOME": str(work)}
        words = [word.format(**given) for word in (*kind.command, *flags)]
        self.start(words, {**env, "PATH": path})

    def wait_ready(self) -> Peer:
        deadline = time.monotonic() + START_S
        while True:
            try:
                ask(self, [{"role": "user", "content": "warm up"}])
                return self
            except (OSError, SystemExit, ValueError) as e:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    said = self.log[-4000:]
                    raise SystemExit(f"it does not answer: {e}\n{said}") from None
                time.sleep(1)


def compare(
    name: str, program: str, model: Path, work: Path, words: int, idle: float
) -> None:
    given = (KINDS[name], program, model, work / name)
    given[-1].mkdir()
    messages = [{"role": "user", "content": text_of(words, 3)}]
    with started(True, *given) as server:
        moments, text, _ = streamed(server, messages, 12)
        read = moments[1].since(moments[0])
        time.sleep(idle)
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "go on"},
    ]
    found = {}
    for how, tier in (("its files", True), ("none", False)):
        with started(tier, *given) as server:
            moments, text, usage = streamed(server, messages, 12)
            took = moments[1].since(moments[0])
            details = usage.get("prompt_tokens_details") or {}
            found[how] = text
            print(
                f"{name}, with {how}: next turn's first token / reading: "
                f"{took.over(read)}; {details.get('cached_tokens')} of "
                f"{usage.get('prompt_tokens')} tokens said to be not read",
                flush=True,
            )
    same = found["its files"] == found["none"]
    print(f"{name}: text {'the same' if same else f'ANOTHER: {found}'}", flush=True)


def started(tier: bool, kind: Kind, program: str, model: Path, work: Path) -> Peer:
    return Peer(kind, tier, program, model, work).wait_ready()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PROGRAM")
    parser.add_argument("--only", choices=KINDS, help="this one alone")
    parser.add_argument("--model", type=Path, help="default: a random one")
    parser.add_argument("--hidden", type=int, default=512, help="of the random one")
    parser.add_argument("--words", type=int, default=190)
    parser.add_argument(
        "--idle",
        type=float,
        default=8.0,
        help="seconds before the kill; some write then",
    )
    options = parser.parse_args()
    peers = {"mlx-safe": PYTHON, **dict(p.split("=", 1) for p in options.peer)}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or tiny_model.make(
            Path(folder) / "model", hidden_size=options.hidden
        )
        for name, program in peers.items():
            if options.only in (None, name):
                given = (model, Path(folder), options.words, options.idle)
                compare(name, program, *given)


if __name__ == "__main__":
    main()
