"""All that touches mlx-lm lies in one folder of the server."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mlx_safe

PACKAGE = Path(mlx_safe.__file__).parent
FOLDER = PACKAGE / "server" / "mlx_lm"
# Still outside the folder.
EXCEPTIONS = {"server/generator.py"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_only_one_folder_imports_mlx_lm() -> None:
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == "mlx_lm" for name in imported(path))
    }
    inside = {name for name in importing if name.startswith("server/mlx_lm/")}
    assert inside, "the folder imports it: the test looks at the right files"
    assert importing - inside == EXCEPTIONS
