"""The lists of imports in loader/system.c are what the images import, and no more."""

from __future__ import annotations

import re
import struct
import sysconfig
from functools import cache
from pathlib import Path

from .runner import load
from .setup import native
from .setup.places import CACHE

LIBSYSTEM = b"/usr/lib/libSystem.B.dylib"
FLAT = 0xFE
# In images of our own, and so on no list.
ELSEWHERE = ("_Unwind_", "_Block_", "_NSConcrete")


def images() -> list[Path]:
    wheels = [*CACHE.glob("mlx/*/mlx/**/*"), *CACHE.glob("ours/*/mlx_safe/*")]
    wheels = [p for p in wheels if p.suffix in (".dylib", ".so")]
    return [*wheels, *CACHE.glob("*.dylib")]


def imports_of(raw: bytes) -> set[tuple[bytes, str]]:
    """(library, name) of each undefined symbol, without C's underscore."""
    (count,) = struct.unpack_from("<I", raw, 16)
    libraries, table, at = [b""], (0, 0, 0), 32
    for _ in range(count):
        kind, size = struct.unpack_from("<2I", raw, at)
        if kind in (0xC, 0x80000018):
            libraries.append(raw[at + 24 : at + size].partition(b"\0")[0])
        elif kind == 2:
            table = struct.unpack_from("<3I", raw, at + 8)
        at += size
    symbols, number, names = table
    found = set()
    for i in range(number):
        name, type_, _, desc, _ = struct.unpack_from("<IBBHQ", raw, symbols + 16 * i)
        if type_ & 0xEE == 0 and type_ & 1:  # undefined, and external
            start = names + name
            text = raw[start : raw.index(b"\0", start)].decode()
            ordinal = desc >> 8
            library = b"flat" if ordinal == FLAT else libraries[ordinal]
            found.add((library, text.removeprefix("_")))
    return found


@cache
def imported() -> frozenset[tuple[bytes, str]]:
    assert len(images()) > 10
    return frozenset().union(*(imports_of(p.read_bytes()) for p in images()))


def of_system() -> set[str]:
    names = {name for library, name in imported() if library == LIBSYSTEM}
    return {name for name in names if not name.startswith(ELSEWHERE)}


@cache
def lists() -> dict[str, set[str]]:
    """Each kind's names, as the loader itself has them."""
    said = load("--imports").stdout.splitlines()
    found = {kind: names for kind, *names in map(str.split, said)}
    shims = native.shims()
    python = {name for name in shims if name.startswith("Py")}
    return {
        "pass": set(found["pass"]),
        "alias": {name.split("=")[0] for name in found["alias"]},
        "shim": shims - python,
        "python": python,
        "refused": set(found["refused"]),
    }


def test_each_import_is_on_one_list_and_each_name_is_imported() -> None:
    found = lists()
    kinds = [found[kind] for kind in ("shim", "alias", "pass")]
    listed = set().union(*kinds)
    assert len(listed) == sum(map(len, kinds)), "a name is on two lists"
    assert of_system() - listed == set(), "nobody has reviewed these"
    assert listed - of_system() == set(), "no image imports these any more"


def test_pythons_variadic_functions_have_a_shim_or_do_not_load() -> None:
    """Against Python's own headers, of the version that runs this."""
    variadic = set()
    for header in Path(sysconfig.get_config_var("INCLUDEPY")).rglob("*.h"):
        if "internal" in header.parts:
            continue
        text = re.sub(r"/\*.*?\*/", "", header.read_text(errors="replace"), flags=re.S)
        for name, arguments in re.findall(
            r"PyAPI_FUNC\([^)]*\)\s*(\w+)\s*\(([^;{}]*?)\)[^;{}]*;", text
        ):
            if "..." in arguments or "va_list" in arguments:
                variadic.add(name)
    assert "PyErr_Format" in variadic
    shims, refused = lists()["python"], tuple(lists()["refused"])
    assert [n for n in variadic - shims if not n.startswith(refused)] == []
