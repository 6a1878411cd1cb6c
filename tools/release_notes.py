"""Prints a release's notes: release_notes.py TAG. Fails if it is no release.

A tag is a release's when it is ``v`` and the version in src/mlx_safe/_version.py,
and CHANGELOG.md has a section of that version with something in it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version(root: Path = ROOT) -> str:
    source = (root / "src" / "mlx_safe" / "_version.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError("src/mlx_safe/_version.py has no version")
    return found[1]


def sections(root: Path = ROOT) -> dict[str, str]:
    """What CHANGELOG.md says of each version, the newest first."""
    text = (root / "CHANGELOG.md").read_text()
    parts = re.split(r"^## \[?([^\s\]]+).*\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


def notes(tag: str, root: Path = ROOT) -> str:
    """The notes of a tag.

    Raises:
        ValueError: why the tag is not that of a release.
    """
    wanted = version(root)
    if tag != f"v{wanted}":
        raise ValueError(f"the tag is {tag}, src/mlx_safe/_version.py says {wanted}")
    found = sections(root).get(wanted)
    if not found:
        raise ValueError(
            f"CHANGELOG.md says nothing of {wanted}: rename its section Unreleased"
        )
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: release_notes.py TAG", file=sys.stderr)
        return 2
    try:
        print(notes(sys.argv[1]))
    except ValueError as e:
        print(f"release_notes: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
