"""Samplers and logits processors that may be called again.

A request that goes on in the middle of its answer calls them with the same arguments
as before, but not as often. One that counts its calls, or draws from a random state of
its own, would give another answer. Python cannot say what a function does; what is
found here is what its code and its closure show, and anything else has a state.
"""

from __future__ import annotations

import builtins
import dis
import functools
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["draws", "has_state", "replayable"]

_MARK = "mlx_safe_replayable"
# What they make depends on arguments and on MLX's random state (mlx-lm 0.31 to 0.32).
_KNOWN = ("mlx_lm.sample_utils",)
_KEEPS = ("STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR")
_DEPTH_MAX = 4


def replayable(function: F) -> F:
    """Marks a sampler or a logits processor: what it returns its arguments decide.

    For an object with ``__call__``, and for a function whose closure changes nothing.
    Returns it.
    """
    setattr(function, _MARK, True)
    return function


def has_state(function: Any) -> bool:
    """Whether ``function`` may depend on more than its arguments."""
    return not _is_pure(function, _DEPTH_MAX)


def draws(sampler: Any) -> bool:
    """Whether ``sampler`` may draw: it is not plainly the likeliest token."""
    if isinstance(sampler, functools.partial):
        return draws(sampler.func)
    if not isinstance(sampler, types.FunctionType):
        return getattr(sampler, "__name__", "") != "argmax"
    code = sampler.__code__
    return "argmax" not in code.co_names or bool(code.co_freevars)


def _is_pure(value: Any, depth: int) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return True
    if depth == 0:
        return False
    if isinstance(value, (tuple, frozenset)):
        return all(_is_pure(part, depth - 1) for part in value)
    if getattr(value, _MARK, False) or isinstance(value, types.ModuleType):
        return True
    kind = type(value)
    # Of MLX: arrays, and functions that are written in C++ or compiled.
    if kind.__module__ == "nanobind" or kind.__module__.startswith("mlx.core"):
        return True
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return all(_is_pure(part, depth - 1) for part in parts)
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    if getattr(value, "__module__", None) in _KNOWN and not isinstance(value, type):
        return True
    return isinstance(value, types.FunctionType) and _has_pure_parts(value, depth - 1)


def _has_pure_parts(function: types.FunctionType, depth: int) -> bool:
    codes = list(_codes(function.__code__))
    if any(i.opname in _KEEPS for code in codes for i in dis.get_instructions(code)):
        return False
    names = {name for code in codes for name in code.co_names}
    found = [
        *(cell.cell_contents for cell in function.__closure__ or ()),
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *(function.__globals__[n] for n in names if n in function.__globals__),
    ]
    return all(_is_pure(value, depth) for value in found if not _is_builtin(value))


def _is_builtin(value: Any) -> bool:
    return value is getattr(builtins, getattr(value, "__name__", ""), _NOTHING)


_NOTHING = object()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
