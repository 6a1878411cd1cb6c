"""Names each sentence of more than 30 words: `make lint` calls it.

Looks at docstrings, comments and messages in Python, at comments in C++, make and
shell, and at Markdown. Code and tables of figures are left out; what is in backticks is
one word. A colon or a semicolon does not end a sentence.
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST = 30
# Written once and not again: what was released, and what others have written.
LEFT_OUT = re.compile(r"^(CHANGELOG\.md|tests/clients/node_modules/|requirements/)")
# What begins a text of its own: an item, "Returns:" or a name that is explained.
ITEM = re.compile(r"([-*+•]|\d+\.|[\w*`., ()]{1,40}:|#+|>)(\s|$)")
# A piece of text, and the line on which it begins.
Piece = tuple[int, str]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a piece of running text, without line breaks."""
    text = re.sub(r"(`+)(?:(?!`).)+?\1", "`code`", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"https?://\S+", "link", text)
    text = re.sub(r"\b(e\.g|i\.e|vs|cf)\.", r"\1", " ".join(text.split()))
    yield from re.split(r"(?<=[.!?])[\"'”)*_]*\s+", text)


def words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search(r"[A-Za-z0-9]", word))


def paragraphs(first: int, lines: Iterable[str], mark: str = "::") -> Iterator[Piece]:
    """Blocks of lines: a blank line, an item of a list or a field begins a new one.

    Lines that are further in than the text and come after ``mark``, and doctests, are
    code.
    """
    block: list[str] = []
    begun = first
    indent = 0
    code: int | None = None
    for number, line in enumerate(lines, first):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if code is not None and bare and depth <= code:
            code = None
        if code is not None:
            if bare and block:
                yield begun, " ".join(block)
                block = []
            continue
        item = ITEM.match(bare)
        # Columns: each line is a row of a table.
        row = "  " in bare
        if not bare or row or (item and (not block or depth <= indent + 4)):
            if block:
                yield begun, " ".join(block)
            block = []
        if bare.startswith((">>>", "...", "|")) or set(bare) <= set("-=~+ "):
            continue
        if not block:
            begun, indent = number, depth
        block.append(bare)
        if bare.endswith(mark):
            code = depth
    if block:
        yield begun, " ".join(block)


def of_markdown(text: str) -> Iterator[Piece]:
    kept = []
    fence = ""
    blank = True
    listed = False
    for line in text.splitlines():
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) else fence
            kept.append("")
        elif match := re.match(r"(```+|~~~+)", bare):
            fence = match[1]
            kept.append("")
        elif line.startswith("    ") and (blank or kept[-1] == "") and not listed:
            kept.append("")
        elif bare.startswith(("|", "<", "!!!", "???", ":::")):
            # Each cell of a table is a text of its own.
            kept.append("")
            continue
        else:
            kept.append(line)
            if bare and not line.startswith(" "):
                listed = bool(re.match(r"([-*+]|\d+\.)\s", bare))
        blank = not bare
    yield from paragraphs(1, kept)
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("|"):
            for cell in line.split("|"):
                # The names of fields are a list and no sentence.
                yield number, re.sub(r"`[^`]*`", "", cell)


def of_comments(pairs: Iterable[tuple[int, int, bool, str]]) -> Iterator[Piece]:
    """Comments of lines that follow each other in one column are one text.

    One behind code, for which the third is true, begins anew.
    """
    block: list[str] = []
    begun = line = column = -1
    for number, at, behind, text in pairs:
        if number != line + 1 or at != column or behind:
            yield from paragraphs(begun, block, ":")
            block, begun, column = [], number, at
        block.append(text)
        line = number
    yield from paragraphs(begun, block, ":")


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if isinstance(node, kinds) else []:
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _messages(tree: ast.Module, docstrings: set[ast.Constant]) -> Iterator[Piece]:
    """Other strings that read like text: they have words and begin a sentence."""
    parts: set[ast.expr] = set(docstrings)
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            text = "".join(
                v.value
                if isinstance(v, ast.Constant) and isinstance(v.value, str)
                else "X"
                for v in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if node in parts else node.value
        # A program, a page or a template is no message.
        if text and "\n" not in text.strip() and "{%" not in text:
            yield getattr(node, "lineno", 0), text


def of_python(text: str) -> Iterator[Piece]:
    tree = ast.parse(text)
    docstrings = set(_docstrings(tree))
    for node in docstrings:
        lines = inspect.cleandoc(str(node.value)).splitlines()
        yield from paragraphs(node.lineno, lines)
    yield from _messages(tree, docstrings)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from of_comments(
        (*t.start, bool(t.line[: t.start[1]].strip()), t.string.lstrip("#:")[1:])
        for t in tokens
        if t.type == tokenize.COMMENT and not t.string.startswith("#!")
    )


def of_lines(text: str, mark: str) -> Iterator[Piece]:
    """Of what has comments from ``mark`` to the end of the line."""
    pattern = re.compile(rf"(^|\s){mark}+ (.*)$")
    yield from of_comments(
        (number, found.start(), bool(line[: found.start()].strip()), found[2])
        for number, line in enumerate(text.splitlines(), 1)
        if (found := pattern.search(line))
    )


def pieces(path: Path) -> Iterator[Piece]:
    reader = READERS.get(path.suffix or path.name)
    return reader(path.read_text(encoding="utf-8")) if reader else iter(())


def of_cpp(text: str) -> Iterator[Piece]:
    yield from of_lines(text, "//")
    code = re.sub(r"//.*", "", text)
    for found in re.finditer(r'(?:"(?:[^"\\\n]|\\.)*"\s*)+', code):
        message = re.sub(r'(?<!\\)"\s*"?', "", found[0])
        # Else it is a list of names.
        if re.search(r"[.,:;]", message):
            yield code.count("\n", 0, found.start()) + 1, message


HASHES = functools.partial(of_lines, mark="#")
READERS: dict[str, Callable[[str], Iterator[Piece]]] = {
    **dict.fromkeys([".py", ".pyi"], of_python),
    ".md": of_markdown,
    **dict.fromkeys([".cpp", ".h", ".c"], of_cpp),
    **dict.fromkeys([".sh", ".mk", ".toml", ".yml", ".in", "Makefile"], HASHES),
}


def long_ones(path: Path) -> Iterator[tuple[int, int, str]]:
    """Of each: its line, its words, and the sentence."""
    for line, text in pieces(path):
        for sentence in sentences(text):
            if (count := words(sentence)) > MOST:
                yield line, count, sentence


def files() -> list[Path]:
    """What git tracks or would track; without git, all but what is built."""
    call = ["git", "ls-files", "-co", "--exclude-standard"]
    git = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        names = git.stdout.splitlines()
    else:
        names = [
            str(path.relative_to(ROOT))
            for folder in ("src", "tests", "tools", "docs", "bench", "packages")
            for path in (ROOT / folder).rglob("*")
        ] + [path.name for path in ROOT.glob("*.md")]
    return [ROOT / name for name in sorted(names) if not LEFT_OUT.match(name)]


def main() -> int:
    status = 0
    for path in [Path(name).resolve() for name in sys.argv[1:]] or files():
        if not path.is_file():
            continue
        for line, count, sentence in sorted(long_ones(path)):
            status = 1
            print(f"{path.relative_to(ROOT)}:{line}: {count} words: {sentence}")
    return status


if __name__ == "__main__":
    sys.exit(main())
