"""Python imports this at its start, in each process that has the environment of
``mlx-safe run``: children that are spawned, and programs that execute themselves again.

It costs a process nothing until MLX is imported, which most never do, so it imports
nothing of mlx_safe before. Words in ``MLX_SAFE_RUN``: ``signals``, ``asgi``,
``replay``, and ``unprotected`` for what `mlx_safe.testing` does alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_WORDS = os.environ.get("MLX_SAFE_RUN", "").split(",")


def _protect_this_process(_: ModuleType) -> None:
    """After MLX has been loaded, and before anybody can use it."""
    try:
        import mlx_safe
    except ImportError as e:
        # Another environment than the one that `mlx-safe` is installed in.
        print(
            f"mlx-safe: {sys.executable} is not protected ({e}): install mlx-safe "
            "into the environment that the program runs in",
            file=sys.stderr,
        )
        return
    if "unprotected" in _WORDS:
        return
    mlx_safe.install(signals="signals" in _WORDS)
    if "asgi" in _WORDS:
        from mlx_safe.asgi import children

        children.leave_when_lost()


def _protect_applications(uvicorn_config: ModuleType) -> None:
    """What uvicorn serves is put under protection, however uvicorn is started."""
    config: Any = uvicorn_config
    load = config.Config.load

    def load_and_protect(self: Any) -> None:
        load(self)
        try:
            from mlx_safe import asgi
        except ImportError:
            return  # has been said when MLX was imported
        self.loaded_app = asgi.protect(self.loaded_app)

    config.Config.load = load_and_protect


def _protect_batches(_: ModuleType) -> None:
    """Batches of mlx-lm's are begun again, in any server."""
    try:
        from mlx_safe import mlx_lm
    except ImportError:
        return  # has been said when MLX was imported
    try:
        mlx_lm.protect()
    except TypeError as e:
        print(f"mlx-safe: --replay: {e}", file=sys.stderr)


def _after_import(calls: dict[str, Callable[[ModuleType], None]]) -> None:
    """`mlx_safe._after_import`, without mlx_safe, which would be installed by that."""
    path = os.path.join(_HERE, os.pardir, os.pardir, "_after_import.py")
    spec = importlib.util.spec_from_file_location("_mlx_safe_after_import", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.after_import(calls)


def _run_the_next() -> None:
    """The environment's own sitecustomize, which this one hides."""
    path = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "MLX_SAFE_RUN" in os.environ:
    _calls: dict[str, Callable[[ModuleType], None]] = {
        "mlx.core": _protect_this_process
    }
    if "asgi" in _WORDS:
        _calls["uvicorn.config"] = _protect_applications
    if "replay" in _WORDS:
        _calls["mlx_lm.generate"] = _protect_batches
    _after_import(_calls)
_run_the_next()
