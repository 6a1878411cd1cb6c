"""A real out of memory: what becomes of requests when other programs fill the GPU.

For a machine with a GPU whose free memory MLX can tell (CUDA). Another process holds
all of the card but ``--leave``; then so many clients send prompts at once, each of
its own text. Once with the stock ``mlx_lm.server``, once protected, once protected
with an explicit ceiling that fits (the floor of the time it can take).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.server import CONTROLLED, Server

GIB = 2**30
NO_END = {"0": -100.0, "1": -100.0}

# Plain memory of MLX's own, so that it works with every backend; it says when it is
# there and holds it until its input ends.
BALLAST = """
import sys
import mlx.core as mx
leave, gib, held = float(sys.argv[1]) * 2**30, 2**30, []
while mx.device_info()["free_memory"] > leave + gib // 2:
    free = mx.device_info()["free_memory"] - leave
    size = max(gib // 4, min(gib, int(free)) // 2**20 * 2**20)
    held.append(mx.zeros((size // 2**20, 2**19), mx.float16) + 1)
    mx.eval(held[-1])
print("held", flush=True)
sys.stdin.read()
"""


def make_model(directory: Path, hidden: int, layers: int) -> Path:
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
        "num_key_value_heads": max(1, hidden // 128),
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


@contextlib.contextmanager
def ballast(leave: float) -> Any:
    """Another process holds all of the card but ``leave`` GiB meanwhile."""
    command = [sys.executable, "-c", BALLAST, str(leave)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()


def ask(server: Server, client: int, words: int, tokens: int, found: list[Any]) -> None:
    """One streamed request; adds (tokens, status or error code, seconds)."""
    begin = time.perf_counter()
    text = " ".join(f"w{3 + (client * 131 + i * 7) % 990}" for i in range(words))
    answer = server.chat(
        text, timeout=300, max_tokens=tokens, stream=True, logit_bias=NO_END
    )
    got = sum(bool(e.get("choices")) for e in answer.events or [] if "error" not in e)
    error = answer.error if answer.status else None
    code = error["code"] if isinstance(error, dict) else answer.broken
    seconds = time.perf_counter() - begin
    found.append((min(got, tokens), code or answer.status, seconds))


def out_of_memory(model: Path, clients: int, words: int, tokens: int) -> None:
    """Prints a row for each server; the card is as full as it is."""
    print("server | tokens answered | s | outcomes | /health")
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("stock", {"stock": True}),
        ("protected", {}),
        ("protected, explicit ceiling", {"ceiling": "4500M"}),
    )
    for name, options in kinds:
        ceiling = options.pop("ceiling", None)
        arguments = ["--max-active-memory-bytes", ceiling] if ceiling else []
        if not options:
            options["program"] = CONTROLLED
        with Server(model, *arguments, **options) as server:
            server.wait_ready()
            ask(server, 99, 200, 4, [])
            found: list[Any] = []
            begin = time.perf_counter()
            threads = [
                threading.Thread(target=ask, args=(server, i, words, tokens, found))
                for i in range(clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - begin
            answered = sum(got for got, *_ in found)
            codes = sorted({str(code) for _, code, _ in found})
            health = server.get("/health").status
            print(
                f"{name} | {answered} of {clients * tokens} | {seconds:.1f} | "
                f"{', '.join(codes)} | {health}",
                flush=True,
            )
            for line in server.log.splitlines():
                if "room for" in line or "fault of the GPU" in line:
                    print("   ", line[:300])
                if "Traceback" in line or "out of memory" in line:
                    print("   ", line[:300])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave", type=float, default=6.0, help="GiB of the card")
    parser.add_argument("--clients", type=int, nargs="+", default=[8])
    parser.add_argument("--words", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    import mlx.core as mx

    info = mx.device_info()
    if "free_memory" not in info:
        sys.exit("bench/gpu.py: MLX computes on no CUDA card here")
    print(f"{info['device_name']}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", args.hidden, args.layers)
        mx.clear_cache()
        with ballast(args.leave):
            for clients in args.clients:
                out_of_memory(model, clients, args.words, args.tokens)


if __name__ == "__main__":
    main()
