"""Which model a node is of: whatever changes a bit of its caches makes it another.

Weights are recognised by their files' names, sizes, times, heads, and by samples of
them: two trainings of one model have the same heads and sizes. Reading all of them
takes as long as loading the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from .format import VERSION

__all__ = ["Identity", "describe_model"]

# What a model, an adapter or a draft is made of, besides its tokenizer.
_SUFFIXES = (".safetensors", ".npz", ".py")
_NAMES = ("config.json", "adapter_config.json", "model.safetensors.index.json")
WHOLE_BELOW = 16 << 20
SAMPLES = 64
SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Identity:
    """digest: 32 hexadecimal digits. text: what it is made of, JSON."""

    digest: str
    text: str

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Identity:
        """The identity of all ``facts`` (JSON-able), and of the format."""
        text = json.dumps({"format": VERSION, **facts}, sort_keys=True, indent=1)
        return cls(sha256(text.encode()).hexdigest()[:32], text)


def describe_model(directory: str | os.PathLike[str]) -> list[list[Any]]:
    """Name, size, time of change (ns) and checksum of each file that counts.

    Raises:
        OSError: one cannot be read.
    """
    return [_describe(path) for path in sorted(_files(Path(directory)))]


def _files(directory: Path) -> Iterable[Path]:
    for path in directory.iterdir():
        if path.suffix in _SUFFIXES or path.name in _NAMES:
            yield path


def _describe(path: Path) -> list[Any]:
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        size = found.st_size
        made = sha256()
        if size <= WHOLE_BELOW:
            made.update(file.read())
        else:
            # A safetensors file begins with the length of its head.
            made.update(head := file.read(8))
            made.update(file.read(min(int.from_bytes(head, "little"), WHOLE_BELOW)))
            for i in range(SAMPLES):
                file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                made.update(file.read(SAMPLE_BYTES))
    return [path.name, size, found.st_mtime_ns, made.hexdigest()]
