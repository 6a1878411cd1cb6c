"""Calls functions once modules have been loaded, by any importer, at any time.

The standard library alone, and nothing of this package: what runs at the start of each
Python of a protected program (``running/startup/``) loads this file by its path.
"""

from __future__ import annotations

import contextlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["after_import"]


def after_import(calls: dict[str, Callable[[Any], object]]) -> None:
    """Calls each function with its module, once, as soon as that has been loaded.

    At once where it is loaded already. An import that fails is waited out: the next one
    counts. What a function raises, the import raises. Any thread.

    Args:
        calls: by the module's whole name.
    """
    waiting = dict(calls)
    for name, call in calls.items():
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        # One that is being loaded is not whole yet, and is found no more.
        if module is not None and not getattr(spec, "_initializing", False):
            del waiting[name]
            call(module)
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Finds what the others find, with a loader that calls."""

    def __init__(self, calls: dict[str, Callable[[Any], object]]) -> None:
        self._calls = calls

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._calls:
            return None
        finders: list[Any] = list(sys.meta_path)
        # Those behind this one: another of this kind asks them, too.
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            if not hasattr(finder, "find_spec"):
                continue
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                # Each time: a program may look for a module and not load it
                # (``importlib.util.find_spec``).
                if spec.loader is not None and not isinstance(spec.loader, type):
                    self._call_after(spec.loader)
                return spec
        return None

    def _call_after(self, loader: Any) -> None:
        load = loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            # A zip archive has one loader for all of its modules.
            spec = module.__spec__
            call = self._calls.pop("" if spec is None else spec.name, None)
            if not self._calls:
                with contextlib.suppress(ValueError):
                    sys.meta_path.remove(self)
            if call is not None:
                call(module)

        loader.exec_module = load_and_call
