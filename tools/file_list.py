"""Writes the list of all files into ARCHITECTURE.md: `make architecture` calls it.

What a file is for is the first sentence of its docstring, or of the comment at its
head. A test compares the list with the files.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- files -->\n", "<!-- /files -->\n"
FOLDERS = ("src/cpp", "src/mlx_safe", "src/pytest_mlx_safe")
# What has no place for a sentence of its own.
OTHERS = {
    "core.map": "Which symbol the extension exports on Linux: Python's entry.",
    "_core.pyi": "The types of the native core, for mypy.",
    "py.typed": "Says that the package has types.",
    "status.html": "The page of `/status`: its style and its script.",
}


def _head(path: Path) -> str:
    """The docstring of a module, or the comment that begins a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    found = re.match(r"(?://.*\n)+", text)
    return re.sub(r"^// ?", "", found[0], flags=re.MULTILINE) if found else ""


def purpose(path: Path) -> str:
    """One sentence on what a file is for; empty: it does not say."""
    if path.name in OTHERS:
        return OTHERS[path.name]
    first = " ".join(_head(path).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", first)[0]
    return sentence.replace("``", "`").replace("|", "\\|")


def rows(folder: Path) -> dict[str, str]:
    """Of the files in a folder; a header and its source are one."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        name = path.name
        if path.suffix == ".cpp" and path.with_suffix(".h").exists():
            continue
        if path.suffix == ".h" and path.with_suffix(".cpp").exists():
            name = f"{path.stem}.h, .cpp"
        found[name] = purpose(path)
    return found


def folders() -> list[Path]:
    return sorted(
        path
        for name in FOLDERS
        for path in (ROOT / name, *(ROOT / name).rglob("*"))
        if path.is_dir() and path.name != "__pycache__" and rows(path)
    )


def listed() -> str:
    """The list as it should stand between the marks."""
    parts = []
    for folder in folders():
        lines = [f"### `{folder.relative_to(ROOT)}/`", "", "| File | What it is |"]
        lines += ["|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in rows(folder).items()]
        parts.append("\n".join(lines) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + listed() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
