"""In the servers of others that the tests start: faults on demand.

``MLX_SAFE_TEST_PLAN`` names a file. What is written into it is a plan of
`mlx_safe.testing.parse_plan`, and counts from then on; an empty one takes all back. A
line ``taken N``, in the file beside it that ends in ``.taken``, says that the N-th was
read.
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
    # Only where a model is loaded; else each helper process would answer.
    while not sys.modules[testing.step.__module__].attached:
        time.sleep(0.01)
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
    from mlx_safe import testing

    plan = Path(os.environ["MLX_SAFE_TEST_PLAN"])
    testing.attach_all(
        lambda: threading.Thread(target=follow, args=(plan,), daemon=True).start()
    )
    if sys.platform != "darwin" and os.environ.get("MLX_SAFE_TEST_LIBSYSTEM"):
        ctypes.CDLL = _CDLL  # type: ignore[misc]
