"""What the jobs of `gpu.py` share: a model, clients, tables."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.server import Server

NO_END = {"0": -100.0, "1": -100.0}
_numbers = itertools.count()
CONNECT_S = 30.0


def kv_heads_of(hidden: int) -> int:
    """Half of the heads, of 64 numbers each, that a model of this width has."""
    return max(1, hidden // 128)


def make_model(
    directory: Path, hidden: int, layers: int, kv_heads: int | None = None
) -> Path:
    """A random qwen3 with a word for each token, so that each token streams."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir(parents=True)
    words = {f"w{i}": i for i in range(3, 1000)}
    words |= {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} w5 {% endfor %}"
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": template,
        **names,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv_heads or kv_heads_of(hidden),
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": 1000,
        "max_position_embeddings": 1_000_000,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    mx.random.seed(1)
    weights = {
        name: (
            mx.random.normal(value.shape) * (0.5 if "embed" in name else 0.03)
            if value.ndim > 1
            else mx.ones(value.shape)
        ).astype(mx.bfloat16)
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(
        str(directory / "model.safetensors"), weights, {"format": "mlx"}
    )
    return directory


@dataclass
class Reply:
    """What one client saw; times are of ``time.time``."""

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of tokens
    lines: list[bytes] = field(default_factory=list)  # the events, as they came
    status: int | None = None
    code: str | None = None  # of an error; or how the connection broke
    ended: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.arrivals)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent if self.arrivals else math.nan

    @property
    def longest(self) -> float:
        """The longest wait between two tokens, in seconds."""
        waits = [b - a for a, b in itertools.pairwise(self.arrivals)]
        return max(waits, default=math.nan)

    @property
    def outcome(self) -> str:
        return self.code or str(self.status)

    @property
    def text(self) -> str:
        events = [json.loads(line[6:]) for line in self.lines]
        choices = [c for event in events for c in event.get("choices", ())]
        return "".join(c["delta"].get("content") or "" for c in choices)

    @property
    def usage(self) -> dict[str, Any]:
        """What the server says of it, if it was asked."""
        events = [json.loads(line[6:]) for line in self.lines if b'"usage"' in line]
        return next((e["usage"] for e in events[::-1] if e.get("usage")), {})


def prompt(words: int) -> str:
    """So many tokens that begin as no other prompt does."""
    number = next(_numbers)
    head = [3 + number % 990, 3 + number // 990 % 990]
    rest = (3 + (number * 131 + i * 7) % 990 for i in range(max(0, words - 2)))
    return " ".join(f"w{n}" for n in [*head, *rest])


def connect(server: Server, timeout: float = 300.0) -> http.client.HTTPConnection:
    """A connection, when the server has room for it.

    The stock server lets five wait to be accepted (Python's `request_queue_size`); what
    comes beyond is refused or reset.
    """
    until = time.time() + CONNECT_S
    while True:
        try:
            return server.connect(timeout)
        except ConnectionError:
            if time.time() > until:
                raise
            time.sleep(0.02)


def connect_all(server: Server, count: int) -> list[http.client.HTTPConnection]:
    """So many connections, one after the other: clients that are all there already."""
    made = []
    for _ in range(count):
        made.append(connect(server))
        time.sleep(0.002)
    return made


def ask(
    server: Server,
    words: int,
    tokens: int,
    *,
    timeout: float = 300.0,
    text: str | None = None,
    connection: http.client.HTTPConnection | None = None,
    **options: Any,
) -> Reply:
    """One streamed request, on ``connection`` or one of its own."""
    body = {
        "messages": [{"role": "user", "content": text or prompt(words)}],
        "stream": True,
        "max_tokens": tokens,
        "logit_bias": NO_END,
        "temperature": 0,
        **options,
    }
    reply = Reply(time.time())
    try:
        with contextlib.closing(connection or server._connect(timeout)) as open_one:
            open_one.request("POST", "/v1/chat/completions", json.dumps(body))
            response = open_one.getresponse()
            reply.status = response.status
            if response.status != 200:
                reply.code = json.loads(response.read())["error"]["code"]
            else:
                _read(reply, response)
    except Exception as e:
        reply.code = type(e).__name__
    reply.ended = time.time()
    return reply


def _read(reply: Reply, response: Any) -> None:
    done = False
    for line in response:
        if line.startswith(b"data: {"):
            reply.lines.append(line)
        if line.startswith(b"data: {") and b'"error"' in line:
            reply.code = json.loads(line[6:])["error"]["code"]
        elif line.startswith(b"data: {") and b'"content"' in line:
            reply.arrivals.append(time.time())
        done = done or line.startswith(b"data: [DONE]")
    if not done:
        reply.code = reply.code or "cut"


def together(count: int, one: Callable[[int], Reply]) -> list[Reply]:
    """``one(0)`` to ``one(count - 1)``, each on a thread of its own."""
    found: list[Reply | None] = [None] * count

    def run(i: int) -> None:
        found[i] = one(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [reply for reply in found if reply is not None]


def outcomes(replies: Iterable[Reply]) -> str:
    """How often each outcome was."""
    names = [reply.outcome for reply in replies]
    return ", ".join(f"{n} x {names.count(n)}" for n in sorted(set(names)))


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(geometric mean, and its 95 % interval) of ratios of pairs."""
    logs = [math.log(r) for r in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), 0.0, math.inf
    # Student's t for 95 %, to a percent: 2.26 for 10 pairs, 2.05 for 30.
    t = 1.96 + 2.4 / (len(logs) - 1)
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def row(*cells: object) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def head(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def write_json(job: str, found: Any) -> None:
    """Into $OUT, if there is one."""
    directory = os.environ.get("OUT")
    if directory:
        path = Path(directory) / f"gpu-{job}-{time.time():.0f}.json"
        path.write_text(json.dumps(found, indent=1, default=str))


def write_log(text: str) -> None:
    """To the end of a file in $OUT, if there is one."""
    directory = os.environ.get("OUT")
    if directory:
        with Path(directory, "servers.log").open("a") as f:
            f.write(f"{text}\n---\n")
