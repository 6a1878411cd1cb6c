"""Chromium without a window: ``make client-browser``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def browse(
    folder: Path, url: str, *options: str, wait_ms: int = 5000
) -> subprocess.CompletedProcess[str]:
    """Lets Chromium load ``url`` and run its script for so long, as its clock goes."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-background-networking", "--disable-component-update"),
        *(f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={wait_ms}"),
        *("--enable-logging=stderr", "--hide-scrollbars", *options, url),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
