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

__all__ = ["draws", "has_state", "may_draw", "replayable"]

_MARK = "mlx_safe_replayable"
# What they make depends on arguments and on MLX's random state (mlx-lm 0.31 to 0.32).
_KNOWN = ("mlx_lm.sample_utils",)
_KEEPS = ("STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR")
_READS = ("LOAD_GLOBAL", "LOAD_NAME")
# In place, of an array that is kept from one call to the next.
_CHANGES = ("STORE_SUBSCR", "DELETE_SUBSCR")
# Modules whose functions their arguments decide; and MLX, whose random state is
# looked after. Of any other nobody knows what it keeps: `random`, `time`.
_MODULES = ("mlx", "mlx_lm", "math", "cmath", "operator", "functools", "numpy")
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


def may_draw(processor: Any) -> bool:
    """Whether a logits processor may draw: it is none of mlx-lm's own."""
    return getattr(processor, "__module__", None) not in _KNOWN


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
    if getattr(value, _MARK, False):
        return True
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _MODULES
    if getattr(value, "__module__", None) in _KNOWN and not isinstance(value, type):
        return True
    kind = type(value)
    # What `mx.compile` makes (``gc_func``, 0.31 to 0.32) does not say what it keeps.
    if kind.__name__.endswith("gc_func"):
        return False
    # Of MLX: arrays and their kinds, and functions that are written in C++.
    if kind.__module__ == "nanobind" or kind.__module__.startswith("mlx.core"):
        return True
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return all(_is_pure(part, depth - 1) for part in parts)
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or _is_pure(value.__self__, depth - 1)
    return isinstance(value, types.FunctionType) and _has_pure_parts(value, depth - 1)


def _has_pure_parts(function: types.FunctionType, depth: int) -> bool:
    codes = list(_codes(function.__code__))
    instructions = [i for code in codes for i in dis.get_instructions(code)]
    done = {i.opname for i in instructions}
    if not done.isdisjoint(_KEEPS):
        return False
    imported = {i.argval for i in instructions if i.opname == "IMPORT_NAME"}
    if any(name.partition(".")[0] not in _MODULES for name in imported):
        return False
    used = {i.argval for i in instructions if i.opname in _READS}
    found = [
        *(cell.cell_contents for cell in function.__closure__ or ()),
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *(function.__globals__[n] for n in used if n in function.__globals__),
    ]
    if not done.isdisjoint(_CHANGES) and any(map(_is_array, found)):
        return False
    attributes = {name for code in codes for name in code.co_names}
    if "random" in attributes and any(map(_is_numpy, found)):
        return False
    return all(_is_pure(value, depth) for value in found if not _is_builtin(value))


def _is_array(value: Any) -> bool:
    return type(value).__name__ in ("array", "ndarray")


def _is_numpy(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__ == "numpy"


def _is_builtin(value: Any) -> bool:
    return value is getattr(builtins, getattr(value, "__name__", ""), _NOTHING)


_NOTHING = object()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
