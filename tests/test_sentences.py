"""What `make lint` says of long sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentences

LONG = "This sentence has " + "many " * 30 + "words."
SHORT = "This one has few. " * 20
CASES = {
    "docstring.py": (f'"""Short.\n\n{LONG}\n"""\n', 3),
    "comment.py": (f"x = 1\n# {LONG[:60]}\n# {LONG[60:]}\n", 2),
    "message.py": (
        f'raise ValueError(\n    "{LONG[:60]}"\n    f"{{1}}{LONG[60:]}"\n)\n',
        2,
    ),
    "native.cpp": (f"// Short.\n//\n// {LONG}\nint x;\n", 3),
    "message.cpp": (f'int x;\nconst char* y = "{LONG[:60]}"\n  "{LONG[60:]}";\n', 2),
    "page.md": (f"# A page\n\n- an item\n- {LONG[:60]}\n  {LONG[60:]}\n", 4),
    "table.md": (f"| a | b |\n|---|---|\n| short | {LONG} |\n", 3),
    "Makefile": (f"all:  # short\n# {LONG}\n", 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_long_sentence_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text, line = CASES[name]
    path.write_text(text)
    ((found, count, _),) = sentences.long_ones(path)
    assert found == line
    assert count > sentences.MOST
    path.write_text(text.replace(LONG, SHORT).replace("many ", ""))
    assert list(sentences.long_ones(path)) == []


def test_what_is_no_sentence_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    code = "one two three four five six seven eight nine ten\n" * 4
    path.write_text(f"Text:\n\n```\n{code}```\n\n| {'`name`, ' * 40} |\n")
    assert list(sentences.long_ones(path)) == []
    path = tmp_path / "rows.py"
    path.write_text("# Columns:\n" + "#   one  two  three four\n" * 20)
    assert list(sentences.long_ones(path)) == []
