"""Functions that are called once a module has been loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlx_safe._after_import import after_import


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was called; modules lie in ``tmp_path``, and all is put back."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finders, modules = list(sys.meta_path), set(sys.modules)
    importlib.invalidate_caches()
    yield []
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_it_is_called_once_and_the_module_is_whole(
    told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "waited_for.py").write_text("value = 7\n")
    after_import({"waited_for": lambda module: told.append(str(module.value))})
    finders = len(sys.meta_path)
    importlib.import_module("waited_for")
    assert told == ["7"]
    assert len(sys.meta_path) == finders - 1
    importlib.reload(sys.modules["waited_for"])
    assert told == ["7"]


def test_one_that_is_loaded_is_called_for_at_once(told: list[str]) -> None:
    after_import({"json": lambda module: told.append(module.__name__)})
    assert told == ["json"]


def test_a_look_without_a_load_changes_nothing(told: list[str], tmp_path: Path) -> None:
    (tmp_path / "looked_for.py").write_text("")
    after_import({"looked_for": lambda module: told.append(module.__name__)})
    for _ in range(2):
        assert importlib.util.find_spec("looked_for") is not None
    assert told == []
    importlib.import_module("looked_for")
    assert told == ["looked_for"]


def test_an_import_that_failed_is_waited_out(told: list[str], tmp_path: Path) -> None:
    (tmp_path / "fails_first.py").write_text(
        "import sys\nif not hasattr(sys, '_again'):\n"
        "    sys._again = True\n    raise ImportError('not yet')\n"
    )
    after_import({"fails_first": lambda module: told.append(module.__name__)})
    try:
        with pytest.raises(ImportError, match="not yet"):
            importlib.import_module("fails_first")
        assert told == []
        importlib.import_module("fails_first")
    finally:
        del sys._again  # type: ignore[attr-defined]
    assert told == ["fails_first"]


def test_two_may_wait_for_one(told: list[str], tmp_path: Path) -> None:
    (tmp_path / "for_two.py").write_text("")
    after_import({"for_two": lambda module: told.append("one")})
    after_import({"for_two": lambda module: told.append("two")})
    importlib.import_module("for_two")
    assert sorted(told) == ["one", "two"]


def test_a_loader_of_several_modules_calls_for_each(
    told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "several.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("first", "second", "third"):
            file.writestr(f"zipped_{name}.py", "")
    monkeypatch.setattr(sys, "path", [str(archive), *sys.path])

    def note(module: ModuleType) -> None:
        told.append(module.__name__)

    after_import({"zipped_first": note, "zipped_third": note})
    for name in ("second", "third", "first"):
        importlib.import_module(f"zipped_{name}")
    assert told == ["zipped_third", "zipped_first"]
