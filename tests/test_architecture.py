"""ARCHITECTURE.md shows the house as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_no_file_that_is_not_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "src|tests|tools|bench|docs|findings"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_module_that_architecture_names_is_in_the_server() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text))
    package = ROOT / "src" / "mlx_safe"
    there = {file.name for file in package.rglob("*.py")}
    assert named
    assert not sorted(name for name in named if Path(name).name not in there)


def test_only_the_profiles_say_where_examples_come_from() -> None:
    """So `make fuzz` has fresh ones of every property test, and CI the same."""
    fixed = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name == "conftest.py" or "node_modules" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in (
                "derandomize",
                "database",
            ):
                fixed.append(f"{path.name}:{node.value.lineno} {node.arg}")
    assert fixed == []
