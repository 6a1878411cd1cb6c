"""In the servers of others that the tests start: faults on demand.

``MLX_SAFE_TEST_PLAN`` names a file. What is written into it is a plan of
`mlx_safe.testing.parse_plan`, and counts from then on; an empty one takes all back. A
line ``taken N``, in the file beside it that ends in ``.taken``, says that the N-th was
read. Every model that mlx-lm or mlx-vlm loads is counted.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LOADERS = ("mlx_lm.utils", "mlx_vlm.utils")


def width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens of each row a call reads; models are called in many ways."""
    names = ("inputs_embeds", "input_embeddings", "inputs", "input_ids")
    for value in (*(kwargs.get(name) for name in names), *args):
        if value is not None and hasattr(value, "shape") and len(value.shape) > 1:
            return int(value.shape[1])
    return 1


def counted(model: Any) -> Any:
    """``model``, whose calls are steps of `mlx_safe.testing`."""
    from mlx_safe import testing

    # mlx-vlm calls the part that speaks.
    target = getattr(model, "language_model", model)
    cls = type(target)
    if getattr(cls, "_counted", False):
        return model

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        testing.step("decode" if width(args, kwargs) == 1 else "prefill")
        return cls.__call__(self, *args, **kwargs)

    target.__class__ = type(
        cls.__name__,
        (cls,),
        {"__call__": call, "__module__": cls.__module__, "_counted": True},
    )
    return model


def wrap(module: Any) -> None:
    load = module.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        if isinstance(found, tuple):
            return (counted(found[0]), *found[1:])
        return counted(found)

    module.load_model = load_model


def follow(path: Path) -> None:
    from mlx_safe import testing

    throw = testing.throw_on_foreign_thread

    def throw_and_say_when(*args: Any) -> None:
        path.with_suffix(".fired").write_text(str(time.time()))
        throw(*args)

    # `step` finds it by this name.
    sys.modules[testing.step.__module__].throw_on_foreign_thread = (  # type: ignore[attr-defined]
        throw_and_say_when
    )
    planned: list[Any] = []
    number, seen = 0, -1
    while True:
        time.sleep(0.01)
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        if changed == seen:
            continue
        seen = changed
        for plan in planned:
            plan.cancel()
        planned = [testing.inject(**p) for p in testing.parse_plan(path.read_text())]
        number += 1
        path.with_suffix(".taken").write_text(f"taken {number}")


class Finder:
    """Wraps the loaders once they are imported."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        if name not in LOADERS:
            return None
        for finder in sys.meta_path:
            if finder is Finder or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                run = loader.exec_module

                def run_and_wrap(module: Any, run: Any = run) -> None:
                    run(module)
                    wrap(module)

                loader.exec_module = run_and_wrap
                return spec
        return None


class _NoLibSystem:
    """What mtplx asks of macOS's library, on Linux."""

    @staticmethod
    def mach_timebase_info(info: Any) -> int:
        info._obj.numer = info._obj.denom = 1
        return 0

    @staticmethod
    def mach_continuous_time() -> int:
        return time.monotonic_ns()

    @staticmethod
    def sysctlbyname(*_: Any) -> int:
        return -1


class _CDLL(ctypes.CDLL):
    def __new__(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, str) and "libSystem" in name:
            return _Functions()
        return ctypes.CDLL.__new__(cls)


class _Functions:
    """Functions whose ``restype`` and ``argtypes`` can be set."""

    def __getattr__(self, name: str) -> Any:
        call = getattr(_NoLibSystem, name)

        def function(*args: Any) -> Any:
            return call(*args)

        setattr(self, name, function)
        return function


if "MLX_SAFE_TEST_PLAN" in os.environ:
    sys.meta_path.insert(0, Finder)
    plan = Path(os.environ["MLX_SAFE_TEST_PLAN"])

    def start(_: Any = None) -> None:
        threading.Thread(target=follow, args=(plan,), daemon=True).start()

    # Only where a model is loaded; else each helper process would answer.
    plain = wrap

    def wrap(module: Any) -> None:
        plain(module)
        if not getattr(start, "done", False):
            start.done = True  # type: ignore[attr-defined]
            start()

    if sys.platform != "darwin" and os.environ.get("MLX_SAFE_TEST_LIBSYSTEM"):
        ctypes.CDLL = _CDLL  # type: ignore[misc]
