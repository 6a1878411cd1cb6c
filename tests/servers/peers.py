"""Servers of others, as PyPI has them, and the faults that each is given.

Each runs in an environment of its own, ``.venvs/server-NAME``, which `make
test-servers` sets up. One that could not be installed is said, and is no failure
unless ``MLX_SAFE_REQUIRE_SERVERS=1``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.server import Answer, Server, eventually, free_port

ROOT = Path(__file__).parent.parent.parent
# They share two cores with whatever else is tested.
START_S = float(os.environ.get("MLX_SAFE_TEST_START_S", "240"))
ANSWER_S = float(os.environ.get("MLX_SAFE_TEST_ANSWER_S", "60"))

# MODELS: a directory that has nothing but the model's.
MODEL, MODELS, PORT, FD = "{model}", "{models}", "{port}", "{fd}"


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        name: of its environment, too. command: with `MODEL` and `PORT` in it.
        versions: what stands in the matrix.
        batched: it uses mlx-lm's `BatchGenerator`, so that it can be begun again.
        env: what it needs on Linux.
        takes_names: requests give the model's name, not its path.
        begins_early: a plain answer's 200 goes out before there is an answer.
        headers: of each request.
        in_child: its model is in a child process, which is all that ends.
    """

    name: str
    venv: str
    command: Sequence[str]
    versions: str
    batched: bool = False
    mlx: str = "0.32"
    env: dict[str, str] = field(default_factory=dict)
    takes_names: bool = False
    begins_early: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    in_child: bool = False

    @property
    def bin(self) -> Path:
        return ROOT / ".venvs" / f"server-{self.venv}" / "bin"

    @property
    def is_installed(self) -> bool:
        return (self.bin / self.command[0]).exists()


VLLM = ("vllm-mlx", "serve", MODEL, "--port", PORT, "--host", "127.0.0.1")
RAPID = ("rapid-mlx", "serve", MODEL, "--port", PORT, "--host", "127.0.0.1")
# Twice the braces: the words are filled in.
DRAFTS = '{{"method":"suffix","num_speculative_tokens":8}}'
MTPLX = ("--no-mtp", "--unsafe-force-unverified", "--yes", "--no-auth")
# By default it takes one at a time, with a generator of its own.
VMLX = ("--continuous-batching", "--max-num-seqs", "4", "--reasoning-parser", "none")
FUSION = ("--api-key", "key")
OPENAI = ("--model-type", "lm", "--port", PORT, "--no-log-file")
PEERS = [
    Peer(
        "vllm-mlx-batched",
        "vllm-mlx-observe",
        (*VLLM, "--continuous-batching"),
        "vllm-mlx 0.6.0 --continuous-batching, mlx 0.32.4, mlx-lm 0.31.3",
        batched=True,
    ),
    Peer(
        "vllm-mlx-batched-0.31",
        "vllm-mlx-intercept",
        (*VLLM, "--continuous-batching"),
        "vllm-mlx 0.6.0 --continuous-batching, mlx 0.31.2, mlx-lm 0.31.3",
        batched=True,
        mlx="0.31",
    ),
    Peer(
        "vllm-mlx-simple",
        "vllm-mlx-observe",
        VLLM,
        "vllm-mlx 0.6.0, mlx 0.32.4, mlx-lm 0.31.3",
    ),
    Peer(
        "rapid-mlx",
        "rapid-mlx",
        RAPID,
        "rapid-mlx 0.16.10, mlx 0.32.4, mlx-lm 0.31.3",
        batched=True,
        env={"RAPID_MLX_TELEMETRY": "0", "DO_NOT_TRACK": "1"},
    ),
    Peer(
        "rapid-mlx-drafts",
        "rapid-mlx",
        (*RAPID, "--speculative-config", DRAFTS),
        "rapid-mlx 0.16.10 --speculative-config (suffix), mlx 0.32.4, mlx-lm 0.31.3",
        batched=True,
        env={"RAPID_MLX_TELEMETRY": "0", "DO_NOT_TRACK": "1"},
    ),
    Peer(
        "vmlx",
        "vmlx",
        (*("vmlx", "serve", MODEL, "--port", PORT, "--host", "127.0.0.1"), *VMLX),
        "vmlx 1.6.81, mlx 0.32.4, mlx-lm 0.31.3",
        batched=True,
    ),
    Peer(
        "flyto-mlx",
        "flyto-mlx",
        ("omlx", "serve", "--model-dir", MODELS, "--port", PORT, "--no-cache"),
        "flyto-mlx 0.7.0 (a fork of omlx), mlx 0.32.3, mlx-lm 0.31.3",
        batched=True,
        takes_names=True,
        begins_early=True,
    ),
    Peer(
        "fusion-mlx",
        "fusion-mlx",
        (*("fusion-mlx", "serve", "--model-dir", MODELS, "--port", PORT), *FUSION),
        "fusion-mlx 0.10.24, mlx 0.32.4, mlx-lm 0.31.3",
        batched=True,
        takes_names=True,
        headers={"Authorization": "Bearer key"},
    ),
    Peer(
        "mlx-openai-server",
        "mlx-openai-server",
        (*("mlx-openai-server", "launch", "--model-path", MODEL), *OPENAI),
        "mlx-openai-server 1.8.1, mlx 0.31.2, mlx-lm 0.31.3",
        batched=True,
        in_child=True,
    ),
    Peer(
        "mlx-vlm",
        "mlx-vlm",
        ("mlx_vlm.server", "--model", MODEL, "--port", PORT, "--host", "127.0.0.1"),
        "mlx-vlm 0.7.10, mlx 0.32.4",
    ),
    Peer(
        "mtplx",
        "mtplx",
        (*("mtplx", "serve", "--model", MODEL, "--port", PORT), *MTPLX),
        "mtplx 2.12.2, mlx 0.32.2, mlx-lm 0.31.3",
        env={"MLX_SAFE_TEST_LIBSYSTEM": "1"},
    ),
]
MODES = {
    "alone": None,
    "run": ("run",),
    "asgi": ("run", "--asgi"),
    "replay": ("run", "--asgi", "--replay"),
}

# Of those that take a descriptor: what they are started with then.
LISTENS = ("run", "--supervise", "--asgi", "--replay", "--listen", PORT)
TAKES_A_DESCRIPTOR = {
    "rapid-mlx": ("rapid-mlx", "serve", MODEL, "--listen-fd", FD),
    "fusion-mlx": (
        *("fusion-mlx", "serve", "--model-dir", MODELS, "--listen-fd", FD),
        *FUSION,
    ),
}


class Running(Server):
    """A peer in a child process."""

    def __init__(self, peer: Peer, mode: str, model: Path, work: Path) -> None:
        self.peer = peer
        self.model = model
        self.port = free_port()
        # FastAPI reads a body as JSON only where it is said that it is.
        self.headers = {"Content-Type": "application/json", **peer.headers}
        self.tls = None
        self._plan = work / "plan"
        self._taken = work / "plan.taken"
        self._plans = 0
        words = [str(peer.bin / peer.command[0]), *peer.command[1:]]
        how = MODES.get(mode, LISTENS)
        if how is not None:
            words = [str(peer.bin / "mlx-safe"), *how, "--", *words]
        models = work / "models"
        models.mkdir(exist_ok=True)
        if not (models / model.name).exists():
            shutil.copytree(model, models / model.name)
        values = {"model": model, "models": models, "port": self.port, "fd": FD}
        words = [w.format(**values) for w in words]
        home = work / "home"
        home.mkdir(exist_ok=True)
        env = {
            **os.environ,
            **peer.env,
            "PATH": f"{peer.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parent / "startup"),
            "MLX_SAFE_TEST_PLAN": str(self._plan),
            # `testing` is imported in each of them; protected is who asks for it.
            "MLX_SAFE_AUTOINSTALL": "0",
            "MLX_SAFE_REPORT_DIR": str(work / "reports"),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(home),
        }
        self.start(words, env)

    def wait_ready(self) -> Running:
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, f"it has ended:\n{self.log}"
            assert time.monotonic() < deadline, f"it does not answer:\n{self.log}"
            with contextlib.suppress(OSError):
                if self.say("warm", max_tokens=2).status == 200:
                    return self
            time.sleep(0.3)

    def plan_faults(self, text: str) -> None:
        """From now on; an empty text takes all back."""
        self._plan.write_text(text)
        self._plans += 1
        taken = f"taken {self._plans}"
        assert eventually(
            lambda: self._taken.exists() and self._taken.read_text() == taken
        ), self.log

    def plan_faults_of_the_next(self, text: str) -> None:
        """Of the program that comes after this one, from its start on."""
        self._plan.write_text(text)
        self._plans = 0

    def last_fired(self) -> float | None:
        """When an exception was thrown that ends the process; `time.time`."""
        file = self._plan.with_suffix(".fired")
        return float(file.read_text()) if file.exists() else None

    def say(self, text: str, stream: bool = False, max_tokens: int = 16) -> Answer:
        return self.post(
            {
                "model": self.model.name if self.peer.takes_names else str(self.model),
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": stream,
            },
            timeout=ANSWER_S,
        )

    def say_all(self, texts: Sequence[str], stream: bool = True) -> list[Answer]:
        """All at once."""
        found: dict[str, Answer] = {}
        threads = [
            threading.Thread(
                target=lambda t=t: found.update({t: self.say(t, stream)}),
                daemon=True,
            )
            for t in texts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * ANSWER_S)
        return [found.get(t, Answer(None, broken="hangs")) for t in texts]

    def stop(self) -> int:
        """Ends it; one that does not end in time is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return super().stop()


@contextlib.contextmanager
def running(peer: Peer, mode: str, model: Path, work: Path) -> Iterator[Running]:
    """A server that answers, ended at the end of the block."""
    work.mkdir(parents=True, exist_ok=True)
    server = Running(peer, mode, model, work)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def outcome(answer: Answer, right: str | None) -> str:
    """What a client saw, in a few words: "right", "503", "event + [DONE]", "wrong 200".

    Args:
        right: the text that it should have been; None: not known.
    """
    if answer.broken is not None:
        return "cut" if answer.status else "no answer"
    if answer.status != 200:
        after = " + Retry-After" if "retry-after" in answer.headers else ""
        return f"{answer.status}{after}"
    if _fails(answer):
        return "event + [DONE]" if answer.done else "event"
    try:
        text = answer.text
    except (KeyError, TypeError, ValueError, IndexError):
        return "wrong 200 (no text)"
    if right is not None and text.strip() != right.strip():
        return "wrong 200"
    is_stream = "event-stream" in answer.headers.get("content-type", "")
    return "right" if not is_stream or answer.done else "right, no [DONE]"


def _fails(answer: Answer) -> bool:
    """Whether a stream tells of an error, in whatever way its server does."""
    if "event-stream" not in answer.headers.get("content-type", ""):
        return False
    events = [e for e in answer.events if isinstance(e, dict)]
    if any("error" in e for e in events):
        return True
    if "event: error" in answer.body or "[METAL]" in answer.body:
        return True
    choices = [c for e in events for c in e.get("choices") or ()]
    return any(c.get("finish_reason") == "error" for c in choices)
