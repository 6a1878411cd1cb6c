"""Samplers and logits processors that may be called again.

A request that goes on in the middle of its answer calls them with the same arguments
as before, but not as often. One that counts its calls, or draws from a random state of
its own, would give another answer. Python cannot say what a function does; what is
found here is what its code and its closure show, and anything else has a state.

What somebody else changes between two calls (a flag in a closure, an attribute, which
functions are in a list) is noticed by comparing what it reads. What is in an array is
not compared.
"""

from __future__ import annotations

import builtins
import dis
import functools
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["draws", "has_state", "may_draw", "reads", "replayable"]

_MARK = "mlx_safe_replayable"
# What they make depends on arguments and on MLX's random state (mlx-lm 0.31 to 0.32).
_KNOWN = ("mlx_lm.sample_utils",)
_KEEPS = ("STORE_DEREF", "DELETE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR")
_READS = ("LOAD_GLOBAL", "LOAD_NAME")
# In place. MLX's arrays do ``a += b`` so as well, also where others have ``a``.
_CHANGES = ("STORE_SUBSCR", "DELETE_SUBSCR")
_CHANGING = frozenset(
    f"{under}{name}{under}"
    for under in ("", "__")
    for name in (
        *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv"),
        *("imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
# Of lists, dictionaries and sets.
_ADDING = frozenset(
    (
        *("append", "extend", "insert", "pop", "remove", "clear", "add", "discard"),
        *("update", "setdefault", "popitem", "iconcat", "reverse"),
    )
)
# What Python itself puts into a class.
_OF_CLASSES = ("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__")
# Modules whose functions their arguments decide; and MLX, whose random state is
# looked after. Of any other nobody knows what it keeps: `random`, `time`.
_MODULES = ("mlx", "mlx_lm", "math", "cmath", "operator", "functools", "numpy")
# Of the functions of `builtins`; the others reach what is outside: `globals`, `open`.
_FUNCTIONS = frozenset(
    (
        *("abs", "all", "any", "ascii", "bin", "callable", "chr", "divmod", "format"),
        *("getattr", "hasattr", "hash", "hex", "isinstance", "issubclass", "iter"),
        *("len", "max", "min", "next", "oct", "ord", "pow", "print", "repr", "round"),
        *("sorted", "sum"),
    )
)
_DEPTH_MAX = 4


def replayable(function: F) -> F:
    """Marks a sampler or a logits processor: what it returns its arguments decide.

    For an object with ``__call__``, and for a function whose closure changes nothing.
    Returns it.
    """
    setattr(function, _MARK, _mark_of(function))
    return function


def _mark_of(function: Any) -> Any:
    # `functools.wraps` copies it to another function, which has other code.
    return getattr(function, "__code__", True)


def has_state(function: Any) -> bool:
    """Whether ``function`` may depend on more than its arguments."""
    look = _Look()
    return (
        not look.is_pure(function, _DEPTH_MAX)
        or (look.changes and (look.has_arrays or look.has_parts))
        or (look.adds and look.has_parts)
    )


def reads(function: Any) -> list[Any]:
    """Numbers and texts that ``function`` reads, and others may change."""
    look = _Look()
    look.is_pure(function, _DEPTH_MAX)
    return look.read


def may_draw(processor: Any) -> bool:
    """Whether a logits processor may draw: it is none of mlx-lm's own."""
    return not _is_known(processor)


def draws(sampler: Any) -> bool:
    """Whether ``sampler`` may draw: it is not plainly the likeliest token."""
    if isinstance(sampler, functools.partial):
        return draws(sampler.func)
    if not isinstance(sampler, types.FunctionType):
        # MLX's own; an object may pass on the name of what it wraps.
        is_mlx = type(sampler).__module__ == "nanobind"
        return not (is_mlx and sampler.__name__ == "argmax")
    code = sampler.__code__
    if code.co_freevars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        return True
    # `mx.argmax`, and nothing beside it: Gumbel's way to draw ends with it, too.
    found = [sampler.__globals__[n] for n in code.co_names if n in sampler.__globals__]
    names = {n for n in code.co_names if n not in sampler.__globals__}
    return not names <= {"argmax"} or any(
        draws(value) for value in found if not isinstance(value, types.ModuleType)
    )


class _Look:
    """What was found of one function, and of what it calls.

    Attributes:
        changes: something is changed in place. adds: or added to, or taken out of.
        has_arrays: it has arrays from one call to the next. has_parts: it has lists or
            attributes.
        read: numbers and texts that it reads, and which functions are in its lists.
    """

    def __init__(self) -> None:
        self.changes = False
        self.adds = False
        self.has_arrays = False
        self.has_parts = False
        self.read: list[Any] = []

    def is_pure(self, value: Any, depth: int) -> bool:
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            self.read.append(value)
            return True
        if depth == 0:
            return False
        if isinstance(value, (tuple, frozenset)):
            return self._are_pure(value, depth - 1)
        if _is_marked(value) or _is_known(value):
            return True
        if isinstance(value, types.ModuleType):
            name = value.__name__
            return name.partition(".")[0] in _MODULES and not _is_numpy_random(name)
        kind = type(value)
        # What `mx.compile` makes (``gc_func``, 0.31 to 0.32) does not say what it
        # keeps.
        if kind.__name__.endswith("gc_func"):
            return False
        # Of MLX: arrays and their kinds, and functions that are written in C++.
        if kind.__module__ == "nanobind" or kind.__module__.startswith("mlx.core"):
            self.has_arrays = self.has_arrays or kind.__name__ == "array"
            return True
        if isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
            return self._are_pure(parts, depth - 1)
        if isinstance(value, types.BuiltinFunctionType):
            return value.__self__ is None or self.is_pure(value.__self__, depth - 1)
        if isinstance(value, types.FunctionType):
            return self._has_pure_parts(value, depth - 1)
        return self._is_pure_object(value, depth - 1)

    def _is_pure_object(self, value: Any, depth: int) -> bool:
        """Of a class written in Python, all of whose methods are pure but the first."""
        self.has_parts = True
        found: list[Any] = list(getattr(value, "__dict__", {}).values())
        for cls in type(value).__mro__[:-1]:
            found += [
                member
                for name, member in vars(cls).items()
                if name not in _OF_CLASSES and name != "__init__"
            ]
        return not isinstance(value, type) and self._are_pure(found, depth)

    def _are_pure(self, values: Iterable[Any], depth: int) -> bool:
        return all(self.is_pure(value, depth) for value in values)

    def _has_pure_parts(self, function: types.FunctionType, depth: int) -> bool:
        attributes = {**function.__dict__}
        for name in (_MARK, "__wrapped__"):
            attributes.pop(name, None)
        self.has_parts = self.has_parts or bool(attributes)  # it may count there
        facts = _facts(function.__code__)
        if not facts.is_pure:
            return False
        self.changes = self.changes or facts.changes
        self.adds = self.adds or facts.adds
        found: list[Any] = list(attributes.values())
        try:
            for cell in function.__closure__ or ():
                found += self._taken_apart(cell.cell_contents)
        except ValueError:  # it is not there yet
            return False
        found += function.__defaults__ or ()
        found += (function.__kwdefaults__ or {}).values()
        for name in facts.used:
            if name in function.__globals__:
                found.append(function.__globals__[name])
            elif not _is_pure_builtin(name):
                return False
        has_numpy = facts.imports_numpy or any(map(_is_numpy, found))
        if has_numpy and "random" in facts.names:
            return False
        return self._are_pure(found, depth)

    def _taken_apart(self, value: Any) -> list[Any]:
        """Of a list of functions, as samplers have for their filters, those."""
        if type(value) is not list or not all(map(callable, value)):
            return [value]
        self.has_parts = True
        self.read.append([_Same(one) for one in value])
        return value


class _Same:
    """Equal to what stands for the same object, which is kept."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Facts:
    """What the code of a function shows, and that of those within it."""

    def __init__(self, code: types.CodeType) -> None:
        codes = list(_codes(code))
        instructions = [i for code in codes for i in dis.get_instructions(code)]
        done = {i.opname for i in instructions}
        imported = {i.argval for i in instructions if i.opname == "IMPORT_NAME"}
        self.names = {name for code in codes for name in code.co_names}
        self.used = {i.argval for i in instructions if i.opname in _READS}
        self.imports_numpy = any(n.partition(".")[0] == "numpy" for n in imported)
        self.is_pure = (
            done.isdisjoint(_KEEPS)
            and all(name.partition(".")[0] in _MODULES for name in imported)
            and not any(map(_is_numpy_random, imported))
        )
        self.adds = not self.names.isdisjoint(_ADDING)
        self.changes = (
            not done.isdisjoint(_CHANGES)
            or not self.names.isdisjoint(_CHANGING)
            or any(map(_is_in_place, instructions))
        )


@functools.lru_cache(maxsize=256)
def _facts(code: types.CodeType) -> _Facts:
    return _Facts(code)


def _is_in_place(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    return name.startswith("INPLACE_") or (  # Python 3.10
        name == "BINARY_OP" and instruction.argrepr.endswith("=")
    )


def _is_marked(value: Any) -> bool:
    mark = getattr(value, _MARK, None)
    return mark is not None and mark is _mark_of(value)


def _is_known(value: Any) -> bool:
    """Whether it is a function of mlx-lm's own."""
    # Not by its ``__module__``, which `functools.wraps` copies.
    names = getattr(value, "__globals__", None)
    if names is not None:
        return names.get("__name__") in _KNOWN
    # What `mx.compile` has made of one.
    return getattr(value, "__module__", None) in _KNOWN and not isinstance(value, type)


def _is_numpy(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__ == "numpy"


def _is_numpy_random(name: str) -> bool:
    return f"{name}.".startswith("numpy.random.")


def _is_pure_builtin(name: str) -> bool:
    return name in _FUNCTIONS or isinstance(getattr(builtins, name, None), type)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
