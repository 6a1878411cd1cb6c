"""Where crash reports go.

Read at import of the package, so without platformdirs, whose import alone takes
longer than all of ours (13 ms, measured). A test holds this against
platformdirs on the system it runs on.
"""

from __future__ import annotations

import os
import sys

__all__ = ["report_dir"]


def report_dir() -> str:
    """``MLX_SAFE_REPORT_DIR``, or ``reports`` in the user's state directory."""
    wanted = os.environ.get("MLX_SAFE_REPORT_DIR")
    if wanted:
        return wanted
    return os.path.join(_state_dir(), "mlx-safe", "reports")


def _state_dir() -> str:
    xdg = os.environ.get("XDG_STATE_HOME", "").strip()
    if xdg:
        return xdg
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Application Support")
    return os.path.expanduser("~/.local/state")
