"""Which names of Python's an extension may leave for the interpreter to supply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import abi3info
import nanobind
from abi3info.models import PyVersion


@cache
def _stable_abi() -> dict[str, PyVersion]:
    """Names of the stable ABI, and since when."""
    entries = [*abi3info.FUNCTIONS.items(), *abi3info.DATAS.items()]
    return {symbol.name: entry.added for symbol, entry in entries}


@cache
def _cpython() -> frozenset[str]:
    """Names that CPython exports, as nanobind lists them for Apple's linker."""
    listed = Path(nanobind.__file__).parent / "cmake" / "darwin-ld-cpython.sym"
    return frozenset(re.findall(r"-U _(\S+)", listed.read_text()))


def check(names: set[str], python: str) -> Iterator[str]:
    """Problems of the names (in C) that a ``python`` (``cp312-abi3``) is to supply."""
    if not any(
        name == "PyModuleDef_Init" or name.startswith("PyModule_") for name in names
    ):
        yield "it makes no Python module"
    for name in sorted(names):
        if python != "cp312-abi3":
            if name not in _cpython():
                yield f"{name} is nobody's: neither CPython nor a library has it"
        elif name not in _stable_abi():
            yield f"{name} is not in Python's stable ABI"
        elif _stable_abi()[name] > PyVersion(3, 12):
            yield f"{name} is in the stable ABI from {_stable_abi()[name]}, not 3.12"
