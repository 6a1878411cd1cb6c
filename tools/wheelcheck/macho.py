"""The extension module for macOS (Mach-O; Apple's <mach-o/loader.h>)."""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lief

from . import code_signature, python_abi

lief.logging.disable()

LIBSYSTEM = "/usr/lib/libSystem.B.dylib"
LIBCXX = "/usr/lib/libc++.1.dylib"
MINIMUM_OS = [14, 0, 0]
COMMANDS = {
    "SEGMENT_64",
    "DYLD_INFO_ONLY",
    "FUNCTION_STARTS",
    "DATA_IN_CODE",
    "SYMTAB",
    "DYSYMTAB",
    "LOAD_DYLINKER",  # zig's linker writes it always; dyld reads it in programs only
    "ID_DYLIB",
    "SOURCE_VERSION",
    "BUILD_VERSION",
    "UUID",
    "LOAD_DYLIB",
    "CODE_SIGNATURE",
}
EXPORTS = {"_PyInit__core", "__mh_dylib_header", "___dso_handle"}
# Were one of these a copy of our own, an exception of libmlx would pass our
# `catch` by, or our terminate handler would never be called.
OF_THE_SYSTEM = (
    "__ZTISt9exception",
    "__ZTISt13runtime_error",
    "___cxa_begin_catch",
    "___cxa_throw",
    "___gxx_personality_v0",
    "__ZSt13set_terminatePFvvE",
)
# nanobind's exceptions: one type in all modules of a process (NB_EXPORT).
COALESCED = re.compile(r"__ZT[ISV]N8nanobind")
# The compiler's own helpers, at the end of the code, have no entries.
COVERED = 0.95
# All that we bind in libSystem, each looked up by a person: none is younger than
# macOS 10.12. (The stub of the SDK that zig carries is of a later macOS than 14.)
OF_LIBSYSTEM = frozenset(Path(__file__).with_name("libsystem.txt").read_text().split())
FLAT, WEAK = -2, 0  # ordinals: look everywhere; one for all images


@cache
def _of_libcxx() -> frozenset[str]:
    """Names in the text stub, which are those that wheels for macOS 14 bind."""
    stub = Path(__file__).parents[1] / "cross" / "libc++.1.tbd"
    return frozenset(re.findall(r"[A-Za-z_$][\w$.]*", stub.read_text()))


def check(raw: bytes, python: str) -> Iterator[str]:
    """Problems of the extension module in a wheel with the tag ``python``."""
    fat = lief.MachO.parse(raw)
    if fat is None:
        yield "not a Mach-O file"
        return
    if fat.size != 1:
        yield f"{fat.size} architectures in one file"
        return
    binary = fat.at(0)
    yield from _header(binary)
    if _kind(binary.header.cpu_type) == "ARM64":
        yield from _bindings(binary, python)
        yield from _unwinding(binary)
        yield from code_signature.check(raw)


def _kind(value: object) -> str:
    """The name of an enumerator: lief prints ``TYPE.SEGMENT_64``."""
    return str(value).rpartition(".")[2]


def _header(binary: lief.MachO.Binary) -> Iterator[str]:
    header = binary.header
    if _kind(header.cpu_type) != "ARM64" or header.cpu_subtype & 0xFFFFFF:
        yield f"it is for {_kind(header.cpu_type)}, not for arm64"
    if _kind(header.file_type) not in ("DYLIB", "BUNDLE"):
        yield f"it is a {_kind(header.file_type)}"
    build = binary.build_version
    if build is None:
        yield "it does not say for which macOS it is"
    elif _kind(build.platform) != "MACOS" or list(build.minos) != MINIMUM_OS:
        minimum = ".".join(map(str, build.minos))
        yield f"it is for {_kind(build.platform)} {minimum}, not for macOS from 14.0"
    for command in binary.commands:
        if _kind(command.command) not in COMMANDS:
            yield f"unknown load command {_kind(command.command)}"
    loaded = _libraries(binary)
    if sorted(loaded) != sorted((LIBSYSTEM, LIBCXX)):
        yield f"it loads {loaded}, not libSystem and libc++ alone"
    exports = {str(symbol.name) for symbol in binary.exported_symbols}
    if "_PyInit__core" not in exports:
        yield "it does not export PyInit__core"
    for name in sorted(exports - EXPORTS):
        yield f"it exports {name}"
    for segment in binary.segments:
        if segment.init_protection & 6 == 6:
            yield f"segment {segment.name} is writable and executable"


def _libraries(binary: lief.MachO.Binary) -> list[str]:
    """In the order of the ordinals."""
    own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    return [str(item.name) for item in binary.libraries if item.command != own]


def _bindings(binary: lief.MachO.Binary, python: str) -> Iterator[str]:
    libraries = _libraries(binary)
    if binary.dyld_info is None:
        yield "no binding opcodes: where its symbols bind cannot be told"
        return
    origins: dict[str, set[str]] = defaultdict(set)
    of_python = set()
    for binding in binary.dyld_info.bindings:
        name = str(binding.symbol.name)
        ordinal = binding.library_ordinal
        if ordinal == FLAT:
            of_python.add(name.removeprefix("_"))
        elif ordinal == WEAK:
            if not COALESCED.match(name):
                yield f"{name} binds to whichever image has it first"
        elif not 0 < ordinal <= len(libraries):
            yield f"{name} binds to the unknown library {ordinal}"
        else:
            origins[name].add(libraries[ordinal - 1])
    for name, found in sorted(origins.items()):
        for library in found & {LIBSYSTEM, LIBCXX}:
            if name not in (OF_LIBSYSTEM if library == LIBSYSTEM else _of_libcxx()):
                yield f"{name} is not known to be in the {library} of macOS 14"
    for name in OF_THE_SYSTEM:
        if origins[name] != {LIBCXX}:
            bound = sorted(origins[name]) or "nothing"
            yield f"{name} binds to {bound}, not to {LIBCXX}"
    yield from python_abi.check(of_python, python)


def _unwinding(binary: lief.MachO.Binary) -> Iterator[str]:
    """<mach-o/compact_unwind_encoding.h>: without these, a throw is an abort."""
    found = {str(section.name): section for section in binary.sections}
    for name in ("__unwind_info", "__gcc_except_tab"):
        if name not in found or found[name].size == 0:
            yield f"no {name}: an exception in it would be an abort"
            return
    table = bytes(found["__unwind_info"].content)
    version, _, _, personalities, count, index, entries = struct.unpack_from(
        "<7I", table
    )
    if version != 1 or entries < 2:
        yield f"__unwind_info has version {version} and {entries} pages"
        return
    if count != 1:
        yield f"__unwind_info names {count} personality routines, not one"
    slots = {b.address: str(b.symbol.name) for b in binary.dyld_info.bindings}
    for (offset,) in struct.iter_unpack(
        "<I", table[personalities : personalities + 4 * count]
    ):
        routine = slots.get(binary.imagebase + offset)
        if routine != "___gxx_personality_v0":
            yield f"the personality routine is {routine}"
    first, *_ = struct.unpack_from("<3I", table, index)
    last, *_ = struct.unpack_from("<3I", table, index + 12 * (entries - 1))
    code = found["__text"]
    covered = (last - first) / code.size
    if first != code.virtual_address - binary.imagebase or not COVERED <= covered <= 1:
        yield f"__unwind_info covers {covered:.0%} of the code"
