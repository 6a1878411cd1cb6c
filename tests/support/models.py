"""Models that programs beside this file make."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent


def make_model(program: str, directory: Path, *arguments: str) -> Path:
    """Runs one of the programs that make a model; in a child, as it uses MLX."""
    command = [str(ROOT / program), str(directory), *arguments]
    subprocess.run([sys.executable, *command], check=True, timeout=120)
    return directory


def make_fp8(model: Path) -> None:
    """Lets the matrices of ``model`` be FP8 in its file, each number 1.0."""
    file = model / "model.safetensors"
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:begin])
    head.pop("__metadata__", None)
    data = b""
    for entry in head.values():
        start, end = (begin + offset for offset in entry["data_offsets"])
        kept = raw[start:end]
        if len(entry["shape"]) == 2:
            entry["dtype"] = "F8_E4M3"
            kept = b"\x38" * math.prod(entry["shape"])
        entry["data_offsets"] = [len(data), len(data) + len(kept)]
        data += kept
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
