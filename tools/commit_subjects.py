"""Names each commit whose subject has more than 72 characters: `make lint` calls it.

Looks at what the checkout has of the history: a shallow one has less of it, and one
without git, as an unpacked sdist, nothing. Merges are others' words.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST = 72
# Before that there was no such rule.
SINCE = "2026-11-28T12:00:00Z"


def long_ones(repository: Path) -> list[str] | None:
    """``HASH: SUBJECT`` of each; None: there is no git, or no history."""
    call = ["git", "log", "--no-merges", f"--since={SINCE}", "--format=%h %s"]
    try:
        log = subprocess.run(call, cwd=repository, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if log.returncode != 0:
        return None
    commits = (line.partition(" ") for line in log.stdout.splitlines())
    return [f"{name}: {text}" for name, _, text in commits if len(text) > MOST]


def main() -> int:
    found = long_ones(ROOT)
    if found is None:
        print("left out: the subjects of commits, as there is no git history here")
        return 0
    for line in found:
        print(f"{line} ({len(line.partition(': ')[2])} characters, {MOST} at most)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
