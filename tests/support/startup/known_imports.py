"""In every child of the tests: transformers reads its own sources only once.

At each import transformers 5.24 reads the 1,100 files of its models, to know which
names it could import. That is 0.55 s of the 1.3 s of processor time that a server
takes to start, and the tests start hundreds. So the first process writes what it
found into the file that ``MLX_SAFE_TEST_IMPORTS`` names, and the others read it.
Without that variable nothing is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "transformers.utils.import_utils"


class Finder:
    """Finds `MODULE` as ever, and wraps its function once it is loaded."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(Finder)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                remember(module, os.environ["MLX_SAFE_TEST_IMPORTS"])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def remember(module: Any, file: str) -> None:
    """Lets the module's `define_import_structure` read its results from ``file``."""
    import pickle
    from pathlib import Path

    define = module.define_import_structure
    try:
        known = pickle.loads(Path(file).read_bytes())
    except FileNotFoundError:
        known = {}

    def remembered(path: Any, prefix: str | None = None) -> Any:
        key = str(path), prefix
        if key not in known:
            known[key] = define(path, prefix)
            # Others may do so at the same time.
            own = Path(f"{file}.{os.getpid()}")
            own.write_bytes(pickle.dumps(known))
            own.replace(file)
        return known[key]

    module.define_import_structure = remembered


def install() -> None:
    """Does so at the import of transformers, if the variable is set."""
    if "MLX_SAFE_TEST_IMPORTS" in os.environ:
        sys.meta_path.insert(0, Finder)
