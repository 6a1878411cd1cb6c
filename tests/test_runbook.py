"""Every line of the log at WARNING and above has its row in docs/runbook.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlx_safe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(mlx_safe.__file__).parent
LEVELS = ("warning", "error", "exception", "critical")


def said(call: ast.Call) -> ast.expr | None:
    """The message of a call that logs at WARNING or above; None: it is none."""
    if not isinstance(call.func, ast.Attribute):
        return None
    whose = ast.unparse(call.func.value)
    is_logger = whose in ("log", "own", "logger") or whose.endswith(".log")
    if not (is_logger or "getLogger" in whose):
        return None
    if call.func.attr in LEVELS:
        return call.args[0]
    return call.args[1] if call.func.attr == "log" else None


def lines() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            message = said(node) if isinstance(node, ast.Call) else None
            if message is not None:
                place = f"{path.relative_to(PACKAGE)}:{message.lineno}"
                assert isinstance(message, ast.Constant), f"{place}: no literal"
                yield place, re.sub(r"%[-+0-9.]*[a-z]", "…", str(message.value))


def rows() -> list[str]:
    text = (ROOT / "docs" / "runbook.md").read_text()
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and all(cell.strip("| ") for cell in row) for row in cells)
    return [row[0].removeprefix("| ").strip("`") for row in cells]


def test_each_line_has_its_row() -> None:
    found = dict(lines())
    assert len(found) > 30
    told = rows()
    assert [place for place, text in found.items() if text not in told] == []


def test_each_row_has_its_line() -> None:
    texts = [text for _, text in lines()]
    assert [row for row in rows() if row not in texts] == []
    assert len(rows()) == len(set(rows()))
