"""Python code in a child process: for everything that may crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run(
    code: str, /, *arguments: str | Path, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` with this interpreter; never raises for its exit status."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
