"""Keeps a process that runs MLX alive when the GPU fails a command buffer.

``import mlx_safe`` installs it; ``MLX_SAFE_AUTOINSTALL=0`` in the environment
turns that off. See `install`, `guard`, `check`, `on_fault` and `status`.
"""

from __future__ import annotations

from . import _autostart, errors
from ._fault import Fault
from ._faults import Subscription, drained, draining, epoch, faults, on_fault
from ._guard import check, guard
from ._install import Status, install, require, status, uninstall
from ._reports import breadcrumb
from ._version import __version__
from .errors import DeviceLostError, GPUError, MetalError, OutOfMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._retry import next_fault, retry

__all__ = [
    "DeviceLostError",
    "Fault",
    "GPUError",
    "MetalError",
    "OutOfMemoryError",
    "Status",
    "Subscription",
    "__version__",
    "breadcrumb",
    "check",
    "drained",
    "draining",
    "epoch",
    "errors",
    "faults",
    "guard",
    "install",
    "next_fault",
    "on_fault",
    "require",
    "retry",
    "status",
    "uninstall",
]

# Not every process needs them: each is imported when it is asked for.
_MODULES = ("asgi", "metrics", "mlx_lm", "testing")
_RETRY = ("next_fault", "retry")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        import importlib  # a quarter of a millisecond, only for these

        return importlib.import_module(f".{name}", __name__)
    if name in _RETRY:
        from . import _retry

        return getattr(_retry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not _autostart.is_left_to_the_command():
    _autostart.begin_or_exit()
