"""In every child of the tests: transformers reads its own sources only once.

At each import transformers 5.24 reads the 1,100 files of its models, to know which
names it could import. That is 0.55 s of the 1.3 s of processor time that a server
takes to start, and the tests start hundreds. So the first process writes what it
found into the file that ``MLX_SAFE_TEST_IMPORTS`` names, and the others read it.
Without that variable nothing is done.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

MODULE = "transformers.utils.import_utils"
PACKAGE = Path(__file__).parents[3] / "src" / "mlx_safe"


def remember(module: Any, file: str) -> None:
    """Lets the module's `define_import_structure` read its results from ``file``."""
    import pickle

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
    """Does so after the import of transformers, if the variable is set."""
    file = os.environ.get("MLX_SAFE_TEST_IMPORTS")
    if file is None:
        return
    # `mlx_safe._after_import`, without mlx_safe, which many children do not import.
    path = PACKAGE / "_after_import.py"
    spec = importlib.util.spec_from_file_location("_mlx_safe_after_import", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.after_import({MODULE: lambda loaded: remember(loaded, file)})
