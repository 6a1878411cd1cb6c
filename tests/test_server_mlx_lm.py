"""All that touches mlx-lm lies in one folder of the server, and in its one list."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules

import pytest

import mlx_safe
from mlx_safe.server.mlx_lm import protocols, seams
from support.programs import program
from support.server import Server

PACKAGE = Path(mlx_safe.__file__).parent
FOLDER = PACKAGE / "server" / "mlx_lm"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_only_one_folder_of_the_server_imports_mlx_lm() -> None:
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in (PACKAGE / "server").rglob("*.py")
        if any(name.partition(".")[0] == "mlx_lm" for name in imported(path))
    }
    inside = {name for name in importing if name.startswith("server/mlx_lm/")}
    assert inside, "the folder imports it: the test looks at the right files"
    assert importing == inside


# -- what the folder uses of mlx-lm is in its list --------------------------------

MODULES = ("server", "generate", "models.cache", "tokenizer_utils", "utils")


def names_of_mlx_lm() -> set[str]:
    """What classes of mlx-lm's server have: methods, fields, and what they set."""
    found: set[str] = set()
    for module in MODULES:
        source = inspect.getsource(importlib.import_module(f"mlx_lm.{module}"))
        for cls in ast.walk(ast.parse(source)):
            if not isinstance(cls, ast.ClassDef):
                continue
            for node in ast.walk(cls):
                if isinstance(node, ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(
                    node.target, ast.Name
                ):
                    found.add(node.target.id)
                elif (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                ):
                    found.add(node.attr)
    return {name for name in found if not name.startswith("__")}


def used_in(path: Path) -> set[str]:
    """Attributes that are read or set, by ``getattr`` and its kin as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
            and isinstance(node.args[1], ast.Constant)
            and isinstance(node.args[1].value, str)
        ):
            found.add(node.args[1].value)
    return found


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """(module of mlx-lm, name) of what is imported from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            if module.partition(".")[0] == "mlx_lm":
                yield from ((module, name.name) for name in node.names)


def types() -> list[type]:
    """The classes of `protocols`."""
    names = [f"{protocols.__name__}.{m.name}" for m in iter_modules(protocols.__path__)]
    return [
        cls
        for name in names
        for cls in vars(importlib.import_module(name)).values()
        if inspect.isclass(cls) and cls.__module__ == name
    ]


def listed() -> set[str]:
    return {
        name
        for cls in types()
        for name in (cls.__name__, *seams.methods(cls), *seams.attributes(cls))
    }


# Our names that mlx-lm has as well, for something else.
NAMESAKES = {
    *(
        "_find",
        "_size",
        "_states",
        "_step",
        "_text",
        "_tools",
        "add",
        "cache_type",
        "close",
        "lengths",
        "sampler",
        "size",
        "step",
        "tokens",
    )
}
# What the lists are about, and those modules that use what is given to them.
OUTSIDE = [
    PACKAGE / "server" / f"{name}.py"
    for name in ("answers", "batches", "generator", "handler", "parts")
]
USERS = sorted({*FOLDER.glob("*.py"), *OUTSIDE} - {FOLDER / "seams.py"})


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.stem)
def test_what_is_used_of_mlx_lm_is_listed(path: Path) -> None:
    unlisted = used_in(path) & names_of_mlx_lm() - listed() - NAMESAKES
    assert unlisted == set()
    # Modules themselves, the class that has one method replaced, and the version.
    known = {*listed(), "GenerationBatch", "sample_utils", "utils", "__version__"}
    assert {name for _, name in imported_names(path)} <= known


def test_what_is_listed_is_looked_for() -> None:
    """A type that no place stands for would be checked by nobody."""
    places = [*seams.PLACES]
    for _, *ways in seams.ALTERNATIVES:
        places += [place for way in ways for place in way]
    looked_for = {cls for _, _, cls in places} | set(seams.PARTS)
    # Models and transformers' tokenizers are of many classes; what they have shows
    # when one is loaded. The others are reached from what is looked for, or optional.
    unseen = {cls.__name__ for cls in types() if cls not in looked_for}
    assert unseen == {
        *("AnsweredContext", "Answers", "Cache", "CacheEntry", "Model"),
        "ModelProvider032",
        *("SampleUtils032", "StopMatcher032", "StopWords", "Tokenizer", "Vision032"),
    }


# -- the order of its calls -------------------------------------------------------

# Writes the names of mlx-lm's functions as it calls them.
TRACED = program("traces_mlx_lm")


def test_mlx_lm_calls_in_the_order_that_is_relied_on(tiny_model: Path) -> None:
    with Server(tiny_model, program=TRACED).wait_ready() as server:
        server.chat()  # makes the batch
        begin = len(server.log)
        server.chat("another")
        between = len(server.log)
        server.chat("alone", seed=1)
        log = server.log
    assert calls(log[begin:between]) == seams.BATCHED_CALLS
    assert calls(log[between:]) == seams.SEQUENTIAL_CALLS


def calls(log: str) -> tuple[str, ...]:
    """The names that `TRACED` wrote, each once."""
    found = (line[5:] for line in log.splitlines() if line.startswith("CALL "))
    return tuple(dict.fromkeys(found))
