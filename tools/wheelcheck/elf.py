"""The extension module for Linux (ELF; manylinux: PEP 600)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import auditwheel.policy
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from . import python_abi

LIBRARIES = {
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
}
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
# As on macOS: one type and one terminate handler with libmlx.so.
OF_THE_SYSTEM = (
    "_ZTISt9exception",
    "_ZTISt13runtime_error",
    "__cxa_begin_catch",
    "__cxa_throw",
    "__gxx_personality_v0",
    "_ZSt13set_terminatePFvvE",
    "_Unwind_Resume",
)
SECTIONS = (".eh_frame", ".eh_frame_hdr", ".gcc_except_table")


@cache
def _allowed(policy: str, machine: str) -> dict[str, set[str]]:
    """Symbol versions that a manylinux policy allows: {"GLIBC": {"2.17", …}}."""
    file = Path(auditwheel.policy.__file__).parent / "manylinux-policy.json"
    policies = {entry["name"]: entry for entry in json.loads(file.read_text())}
    versions = policies[policy]["symbol_versions"][machine]
    return {name: set(found) for name, found in versions.items()}


def check(raw: bytes, python: str, platform: str) -> Iterator[str]:
    """Problems of the extension in a wheel for ``platform`` (manylinux_2_35_…)."""
    policy, _, machine = platform.rpartition("_35_")
    try:
        elf = ELFFile(io.BytesIO(raw))
    except ELFError:
        yield "not an ELF file"
        return
    if elf["e_machine"] != MACHINES[machine]:
        yield f"it is for {elf['e_machine']}, not for {machine}"
        return
    yield from _dynamic(elf, machine)
    yield from _symbols(elf, f"{policy}_35", machine, python)
    for name in SECTIONS:
        section = elf.get_section_by_name(name)
        if section is None or section["sh_size"] == 0:
            yield f"no {name}: an exception in it would be an abort"
    for segment in elf.iter_segments():
        if segment["p_flags"] & 3 == 3:  # writable and executable
            yield f"segment {segment['p_type']} is writable and executable"


def _dynamic(elf: ELFFile, machine: str) -> Iterator[str]:
    for tag in elf.get_section_by_name(".dynamic").iter_tags():
        kind = tag["d_tag"]
        if kind == "DT_NEEDED" and tag.needed not in {*LIBRARIES, LOADERS[machine]}:
            yield f"it loads {tag.needed}"
        if kind in ("DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"):
            yield f"it has {kind}"


def _symbols(elf: ELFFile, policy: str, machine: str, python: str) -> Iterator[str]:
    versions = elf.get_section_by_name(".gnu.version")
    needed = {
        auxiliary["vna_other"]: (version.name, auxiliary.name)
        for version, found in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for auxiliary in found
    }
    origins = {}
    of_python = set()
    exports = set()
    for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if not symbol.name:
            continue
        if symbol["st_shndx"] != "SHN_UNDEF":
            exports.add(symbol.name)
            continue
        origin = needed.get(versions.get_symbol(index)["ndx"])
        if origin is not None:
            origins[symbol.name] = origin
        elif symbol["st_info"]["bind"] != "STB_WEAK":
            of_python.add(symbol.name)
    for name in sorted(exports - {"PyInit__core"}):
        yield f"it exports {name}"
    if "PyInit__core" not in exports:
        yield "it does not export PyInit__core"
    allowed = _allowed(policy, machine)
    for name, (library, version) in sorted(origins.items()):
        family, _, number = version.partition("_")
        if number not in allowed.get(family, ()):
            yield f"{name} needs {version} of {library}, which {policy} does not have"
    for name in OF_THE_SYSTEM:
        library = origins.get(name, ("nothing",))[0]
        if library not in ("libstdc++.so.6", "libgcc_s.so.1"):
            yield f"{name} binds to {library}, not to the system's C++ runtime"
    yield from python_abi.check(of_python, python)
