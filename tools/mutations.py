"""Changes of a source in one place at a time, for mutants.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Change", "of_cpp", "of_python"]


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        line: of the source, from 1.
        function: that it is in, with its class; "": none.
        before, after: the statement or line, as it was and as it is.
        text: the whole source with the change.
    """

    line: int
    function: str
    before: str
    after: str
    text: str


# -- C++, line by line -----------------------------------------------------------------

CPP_SWAPS = (
    (r"(?<![<>=!-])>=", ">"), (r"(?<![<>=!-])<=", "<"),
    (r"(?<=[\w)\]] )>(?= [\w(])", ">="), (r"(?<=[\w)\]] )<(?= [\w(])", "<="),
    (r"==", "!="), (r"!=", "=="), (r"&&(?! )|&&(?= )", "||"), (r"\|\|", "&&"),
    (r"(?<![\w)])!(?=[\w(*])", ""), (r"\btrue\b", "false"), (r"\bfalse\b", "true"),
    (r"\+ 1\b", "+ 2"), (r"- 1\b", "- 0"), (r"\+\+", "--"), (r"\? 1 : 0", "? 0 : 1"),
    (r"std::min\b", "std::max"), (r"std::max\b", "std::min"),
    (r"\bany_of\b", "all_of"), (r"\bnone_of\b", "any_of"),
    (r"\bcontinue;", "break;"), (r" &= ", " |= "), (r" \|= ", " &= "),
)  # fmt: skip
CPP_STATEMENT = re.compile(r"\s+[\w:.>\[\]*&()-]+(\(.*\)| = .*);(\s*//.*)?$")
# As clang-format leaves them: at the margin, those of a class two columns to the right.
CPP_CLASS = re.compile(r"(?:class|struct) (\w+)[^;]*$")
CPP_FUNCTION = re.compile(r"(?=\w)[\w:<>*& ]*?([\w:~]+)\(")
CPP_KEPT = re.compile(r"\s*(auto|const|return)\b")


def of_cpp(text: str) -> Iterator[Change]:
    """Operators and constants changed, statements of one line taken out."""
    lines = text.splitlines()
    owner = function = ""
    for number, line in enumerate(lines):
        if line.startswith("}"):
            owner = function = ""
        elif found := CPP_CLASS.match(line):
            owner = f"{found[1]}::"
        elif found := CPP_FUNCTION.match(line[2 if owner else 0 :]):
            function = owner + found[1]
        for changed in _of_cpp_line(line):
            rest = [*lines[:number], changed, *lines[number + 1 :], ""]
            whole = "\n".join(rest)
            yield Change(number + 1, function, line.strip(), changed.strip(), whole)


def _of_cpp_line(line: str) -> Iterator[str]:
    code = line.partition("//")[0]
    if not code.strip() or code.lstrip().startswith(("#", "using ", "template")):
        return
    for pattern, other in CPP_SWAPS:
        for match in re.finditer(pattern, code):
            yield line[: match.start()] + other + line[match.end() :]
    if CPP_STATEMENT.match(code.rstrip()) and not CPP_KEPT.match(code):
        yield code[: len(code) - len(code.lstrip())] + ";"


# -- Python, by its syntax tree --------------------------------------------------------

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Their opposite is among the operators.
OPPOSITES = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)

Set = Callable[[], None]


def of_python(text: str) -> Iterator[Change]:
    """Operators, constants and conditions changed, arguments and statements taken out.

    Not of messages to the log, of types and of docstrings.
    """
    tree = ast.parse(text)
    for function, body in _bodies(tree):
        for index, statement in enumerate(body):
            if _is_kept(statement):
                continue
            before = _head(statement)
            for change, undo in _edits(statement):
                change()
                after, whole = _head(statement), ast.unparse(tree)
                yield Change(statement.lineno, function, before, after, whole)
                undo()
            if _can_go(statement):
                body[index] = ast.Pass()
                whole = ast.unparse(tree)
                yield Change(statement.lineno, function, before, "pass", whole)
                body[index] = statement


def _bodies(node: ast.AST, function: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    """With the function or class that each is of."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        function = f"{function}.{node.name}".lstrip(".")
    for name in ("body", "orelse", "finalbody"):
        found = getattr(node, name, None)
        if isinstance(found, list):
            yield function, found
    for child in ast.iter_child_nodes(node):
        yield from _bodies(child, function)


def _is_kept(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        value = statement.value
        is_log = isinstance(value, ast.Call) and ast.unparse(value.func)[:4] == "log."
        return is_log or isinstance(value, ast.Constant)
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    return isinstance(statement, kept)


def _can_go(statement: ast.stmt) -> bool:
    """It can be left out, and what is left is a program."""
    if isinstance(statement, ast.Assign):
        return not isinstance(statement.targets[0], ast.Name | ast.Tuple)
    gone = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)
    return isinstance(statement, gone)


def _head(statement: ast.stmt) -> str:
    """The statement without those that it holds."""
    return ast.unparse(statement).partition("\n")[0]


def _edits(statement: ast.stmt) -> Iterator[tuple[Set, Set]]:
    """Ways to change it, each with the way back."""
    if isinstance(statement, ast.If | ast.While | ast.Assert):
        test = statement.test
        is_single = isinstance(test, ast.Compare) and len(test.ops) == 1
        if not (is_single and isinstance(test.ops[0], OPPOSITES)):  # type: ignore[attr-defined]
            yield _assign(statement, "test", ast.UnaryOp(ast.Not(), test))
    for node in _own(statement):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                for index, item in enumerate(value):
                    for other in _others(item):
                        yield _put(value, index, other)
            else:
                for other in _others(value):
                    yield _assign(node, name, other)
        if isinstance(node, ast.Call):
            for index, keyword in enumerate(node.keywords):
                rest = [*node.keywords[:index], *node.keywords[index + 1 :]]
                if keyword.arg is not None:
                    yield _assign(node, "keywords", rest)


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of it, without its types and the statements that it holds."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if name == "annotation":
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.stmt):
                    todo.append(child)


def _others(node: object) -> Iterator[ast.AST]:
    """What may stand in the place of ``node``."""
    if type(node) in OPERATORS:
        yield OPERATORS[type(node)]()  # type: ignore[index]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def _assign(node: ast.AST, name: str, value: object) -> tuple[Set, Set]:
    old = getattr(node, name)
    return lambda: setattr(node, name, value), lambda: setattr(node, name, old)


def _put(items: list[object], index: int, value: object) -> tuple[Set, Set]:
    old = items[index]

    def put(item: object) -> None:
        items[index] = item

    return lambda: put(value), lambda: put(old)
