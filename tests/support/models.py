"""Models that programs beside this file make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent


def make_model(program: str, directory: Path, *arguments: str) -> Path:
    """Runs one of the programs that make a model; in a child, as it uses MLX."""
    command = [str(ROOT / program), str(directory), *arguments]
    subprocess.run([sys.executable, *command], check=True, timeout=120)
    return directory
