"""ARCHITECTURE.md shows the house as it is."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import file_list
import pytest

import mlx_safe
from mlx_safe import errors

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


PACKAGE = ROOT / "src" / "mlx_safe"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
} - {"__init__"}
# Commands and what they are made of: they may know the server.
COMMANDS = {"__main__", "cli", "doctor", "checks", "running", "top"}


def _imported(name: str) -> set[str]:
    """The modules of the package that ``name`` imports, also in its functions."""
    path = PACKAGE.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    here = name.split(".") if path.is_dir() else name.split(".")[:-1]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) + 1 - node.level]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return (found & MODULES) - {name}


IMPORTS = {name: _imported(name) for name in sorted(MODULES)}


def test_no_modules_import_each_other() -> None:
    """Nor by way of others: what imports nothing that is left can be taken away."""
    left = dict(IMPORTS)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def _part(name: str) -> str:
    first = name.split(".")[0]
    if first in COMMANDS - {"running"}:
        return "commands"
    folder = (PACKAGE / first).is_dir() and first != "errors"
    return first if folder else "library"


def test_the_parts_are_drawn_as_they_import_each_other() -> None:
    imports = {
        (_part(name), _part(other))
        for name, found in IMPORTS.items()
        for other in found
        if not other.startswith("_core") and _part(name) != _part(other)
    }
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    _, drawing, _ = re.split(r"<!-- /?parts -->", text)
    drawn = {
        (tail, head)
        for tails, heads in re.findall(r"^    (.+) -\.?->? (.+)$", drawing, re.M)
        for tail in tails.split(" & ")
        for head in heads.split(" & ")
    }
    parts = {part for arrow in imports for part in arrow} - {"library"}
    to_library = {(part, "library") for part in parts - {"memory"}}
    assert drawn | to_library == imports


def test_the_library_knows_nothing_of_the_server() -> None:
    above = [
        (name, other)
        for name, found in IMPORTS.items()
        for other in found
        if other.split(".")[0] == "server"
        and name.split(".")[0] not in {"server", *COMMANDS}
    ]
    assert above == []


def test_what_knows_mlx_lm_takes_little_from_the_server() -> None:
    """And the rest of the server imports no mlx-lm: `server/mlx_lm/` does."""
    taken = {
        other
        for name, found in IMPORTS.items()
        if name.startswith("server.mlx_lm")
        for other in found
        if other.startswith("server.") and not other.startswith("server.mlx_lm")
    }
    assert taken <= {"server.logs", "server.recorder", "server.replies"}
    for path in sorted((PACKAGE / "server").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^ *(from|import) mlx_lm\b", text, re.MULTILINE), path


API = ROOT / "docs" / "api"


def test_each_public_module_has_a_page_in_the_reference() -> None:
    pages = "".join(page.read_text() for page in API.glob("*.md"))
    for name in (*mlx_safe._MODULES, "errors", "memory"):
        assert f"\n::: mlx_safe.{name}\n" in pages, name


def test_the_reference_has_each_public_name() -> None:
    page = (API / "library.md").read_text()
    listed = re.findall(r"\w+", page.partition("members: [")[2].partition("]")[0])
    # Those have pages of their own.
    elsewhere = {"errors", "__version__", *errors.__all__}
    assert sorted(listed) == sorted(set(mlx_safe.__all__) - elsewhere)


def _names_of_threads() -> Iterator[tuple[str, str]]:
    """Of each thread that the package starts: where, and its name."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and made.endswith(("Thread", "PoolExecutor")):
                given = ("name", "thread_name_prefix")
                names = [ast.unparse(k.value) for k in node.keywords if k.arg in given]
                yield f"{path.name}:{node.lineno}", "".join(names).strip("'\"")


def test_each_thread_has_a_name_that_architecture_lists() -> None:
    """A user sees it in a debugger and in a crash report."""
    found = dict(_names_of_threads())
    assert [w for w, name in found.items() if not name.startswith("mlx-safe-")] == []
    page = (ROOT / "ARCHITECTURE.md").read_text()
    table = page.partition("## Threads")[2].partition("## ")[0]
    assert set(found.values()) == set(re.findall(r"`(mlx-safe[^`]*)`", table))


def test_architecture_lists_every_file_with_its_purpose() -> None:
    silent = [
        str(folder / name)
        for folder in file_list.folders()
        for name, text in file_list.rows(folder).items()
        if not text
    ]
    assert silent == []
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = page.partition(file_list.BEGIN)[2].partition(file_list.END)[0]
    assert listed == file_list.listed(), "run `make architecture`"


NATIVE = ROOT / "src" / "cpp"
RULES_DEFINED = re.compile(r"^// (R\d+) +[A-Z]", re.MULTILINE)


def _rules_named(folder: Path, *ends: str) -> set[str]:
    return {
        rule
        for end in ends
        for path in folder.rglob(f"*{end}")
        for rule in re.findall(r"\bR\d+\b", path.read_text(encoding="utf-8"))
    }


def test_docs_headers_and_native_tests_have_the_same_rules() -> None:
    page = (ROOT / "docs" / "metal.md").read_text(encoding="utf-8")
    in_docs = re.findall(r"^- \*\*(R\d+)\*\*", page, re.MULTILINE)
    assert in_docs == [f"R{n}" for n in range(1, len(in_docs) + 1)]
    headers = (NATIVE / "metal").glob("*.h")
    defined = [r for path in headers for r in RULES_DEFINED.findall(path.read_text())]
    assert sorted(defined) == sorted(in_docs), "each is defined once, in a header"
    # Where the rule is kept, which is not where it is written down.
    assert _rules_named(NATIVE, ".cpp") == set(in_docs)
    assert _rules_named(ROOT / "tests" / "native", ".cpp", ".h") == set(in_docs)


def test_the_package_uses_the_words_of_the_field() -> None:
    """Who is "told" is notified, called or answered; ``.told`` is a name on disk."""
    riddles = re.compile(r"(?<!\.)\b(told|whoever|of ours)\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sorted((ROOT / "src").rglob("*"))
        if path.suffix in (".py", ".cpp", ".h")
        for match in riddles.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


SCREEN = 60


def test_a_function_fits_a_screen() -> None:
    """Without the functions and classes in it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)

    def lines(node: ast.AST) -> int:
        assert isinstance(node, (*kinds, ast.ClassDef))
        return (node.end_lineno or 0) - node.lineno + 1

    def inner(node: ast.AST) -> int:
        return sum(
            lines(child) if isinstance(child, (*kinds, ast.ClassDef)) else inner(child)
            for child in ast.iter_child_nodes(node)
        )

    too_long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kinds) and lines(node) - inner(node) > SCREEN
    ]
    assert too_long == []


# Frames: the lines between are each test's own.
FRAMES = {"deaths.py", "native.py", "test_retry.py"}


def _text(node: ast.AST) -> str:
    """Of a string, or of an f-string with names for what it puts in; else empty."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) or "X" for value in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""


def test_programs_of_the_tests_are_files() -> None:
    """In tests/programs, where ruff and mypy see them; a few lines may be strings."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name in FRAMES or "node_modules" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = _text(node)
            if len([x for x in text.splitlines() if x.strip()]) < 6:
                continue
            try:
                body = ast.parse(textwrap.dedent(text)).body
            except (SyntaxError, ValueError):
                continue
            if any(isinstance(x, (ast.Import, ast.ImportFrom)) for x in body):
                found.append(f"{path.relative_to(ROOT)}: {text[:60]}")
    assert found == []
