"""What the code of a libmlx.dylib for arm64 refers to and calls.

metal-cpp keeps each selector in a variable and registers all of them, used or
not, so the selectors' names in the file prove nothing. What counts is which
functions load which variable. MLX's wheels keep their symbol tables, so both
have names.
"""

from __future__ import annotations

import re
import zipfile
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import capstone
import lief
from capstone import arm64

SELECTOR = re.compile(r"__ZN3MTL7Private8Selector\d+s_k(\w+)E$")
COMPLETION_HANDLER = re.compile(r"FvPN3MTL13CommandBufferEEEclE")
OF_MLX = re.compile(r"_ZNK?3mlx4core")
ADRP_MASK, ADRP = 0x9F000000, 0x90000000
CALL_MASK, CALL, JUMP = 0xFC000000, 0x94000000, 0x14000000
PAGE = 0x1000


@dataclass
class Function:
    """One function: where, and what it does."""

    name: str
    start: int
    end: int
    calls: set[str] = field(default_factory=set)
    selectors: set[str] = field(default_factory=set)


class Library:
    """The functions of one libmlx.dylib, by mangled name (without the first _).

    A name that several functions have (local lambdas of different sources) is
    numbered: ``name#2``.
    """

    def __init__(self, raw: bytes) -> None:
        fat = lief.MachO.parse(raw)
        assert fat is not None, "not a Mach-O file"
        self.binary = fat.at(0)
        text = self.binary.get_section("__text")
        assert text is not None
        self.base = text.virtual_address
        self.code = bytes(text.content)
        self.words = array("I", self.code)
        self._engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
        self._engine.detail = True
        self.functions = self._named_functions()
        self._starts = [f.start for f in self.functions]
        self.by_name = {f.name: f for f in self.functions}
        self._read_calls()
        self._read_selectors()

    def _named_functions(self) -> list[Function]:
        names: dict[int, str] = {}
        for symbol in self.binary.symbols:
            # In a section, and not a debugger's entry.
            if symbol.raw_type & 0xE0 == 0 and symbol.raw_type & 0xE == 0xE:
                names.setdefault(symbol.value, str(symbol.name)[1:])
        starts = sorted({*self.binary.function_starts.functions})
        end = self.base + len(self.code)
        seen: dict[str, int] = defaultdict(int)
        found = []
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            name = names.get(start, f"sub_{start:x}")
            seen[name] += 1
            if seen[name] > 1:
                name += f"#{seen[name]}"
            found.append(Function(name, start, stop))
        return found

    def _at(self, address: int) -> Function:
        return self.functions[bisect_right(self._starts, address) - 1]

    def _imports(self) -> dict[int, str]:
        """The imported name that each stub jumps to, by the stub's address."""
        slots = {
            b.address: str(b.symbol.name)[1:] for b in self.binary.bindings if b.symbol
        }
        section = self.binary.get_section("__stubs")
        found = {}
        stub_size = 12  # adrp x16; ldr x16, [x16]; br x16
        code = bytes(section.content)
        for offset in range(0, len(code), stub_size):
            address = section.virtual_address + offset
            for slot in self._loads(code[offset : offset + stub_size], address):
                if slot in slots:
                    found[address] = slots[slot]
        return found

    def _read_calls(self) -> None:
        imports = self._imports()
        for index, word in enumerate(self.words):
            kind = word & CALL_MASK
            if kind != CALL and kind != JUMP:
                continue
            here = self.base + 4 * index
            distance = word & 0x3FFFFFF
            distance -= (distance & 0x2000000) << 1
            target = here + 4 * distance
            caller = self._at(here)
            if target in imports:
                caller.calls.add(imports[target])
            elif not caller.start <= target < caller.end:
                callee = self._at(target)
                if callee.start == target:
                    caller.calls.add(callee.name)

    def _read_selectors(self) -> None:
        variables = {}
        for symbol in self.binary.symbols:
            if match := SELECTOR.match(str(symbol.name)):
                variables[symbol.value] = match[1]
        self.registered = set(variables.values())
        assert variables, "no selector variables: metal-cpp or its linkage changed"
        pages = {address // PAGE for address in variables}
        todo: dict[int, Function] = {}
        for index, word in enumerate(self.words):
            if word & ADRP_MASK == ADRP:
                here = self.base + 4 * index
                if _adrp_page(word, here) // PAGE in pages:
                    function = self._at(here)
                    todo[function.start] = function
        for function in todo.values():
            if function.name.startswith("_GLOBAL__sub_I_"):
                continue  # registers them
            begin, end = function.start - self.base, function.end - self.base
            for address in self._loads(self.code[begin:end], function.start):
                if address in variables:
                    function.selectors.add(variables[address])

    def _loads(self, code: bytes, address: int) -> Iterator[int]:
        """Addresses that the code reaches by ADRP and an offset."""
        known: dict[int, int] = {}
        for one in self._engine.disasm(code, address):
            operands = one.operands
            if one.id == arm64.ARM64_INS_ADRP:
                known[operands[0].reg] = operands[1].imm
                continue
            if one.id == arm64.ARM64_INS_ADD and len(operands) == 3:
                base = operands[1].reg
                if base in known and operands[2].type == arm64.ARM64_OP_IMM:
                    target = known[base] + operands[2].imm
                    known[operands[0].reg] = target
                    yield target
                    continue
            for operand in operands:
                if operand.type == arm64.ARM64_OP_MEM and operand.mem.base in known:
                    yield known[operand.mem.base] + operand.mem.disp
            for register in one.regs_access()[1]:
                known.pop(register, None)

    def users(self, selector: str) -> set[str]:
        """Names of the functions that load a selector: ``setSignaledValue:``."""
        known = selector.replace(":", "_")  # metal-cpp's name of it
        assert known in self.registered, f"metal-cpp has no selector {selector}"
        return {f.name for f in self.functions if known in f.selectors}

    def completion_handlers(self) -> list[Function]:
        """The lambdas that MLX gives to addCompletedHandler:."""
        return [f for f in self.functions if COMPLETION_HANDLER.search(f.name)]

    def throws(self, function: Function) -> bool:
        """Whether it throws, itself or in a function of mlx::core that it calls.

        What the standard library or fmt would throw (for lack of memory, for a
        bad format) does not count: it is not how MLX tells of a fault.
        """
        seen: set[str] = set()
        left = [function.name]
        while left:
            name = left.pop()
            seen.add(name)
            if "__cxa_throw" in self.by_name[name].calls:
                return True
            left += [
                callee
                for callee in self.by_name[name].calls - seen
                if callee in self.by_name and OF_MLX.match(callee)
            ]
        return False


def plain_name(mangled: str) -> str:
    """``Event::wait`` for that function of mlx::core, whatever its parameters.

    A lambda in it is ``Event::wait (lambda)``: lambdas are numbered anew with
    each change, and a class template's arguments come and go.
    """
    _, found, rest = mangled.partition("3mlx4core")
    if not found:
        return mangled
    parts = []
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        rest = rest[match.end() :]
        parts.append(rest[:length])
        rest = rest[length:]
    if re.match(r"C[12]E", rest):
        parts.append(parts[-1])  # a constructor
    is_lambda = "__function6__func" in mangled
    return "::".join(parts) + (" (lambda)" if is_lambda else "")


def _adrp_page(word: int, here: int) -> int:
    immediate = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
    immediate -= (immediate & 0x100000) << 1
    return (here & -PAGE) + immediate * PAGE


def library_of(wheel: Path) -> Library:
    """The libmlx.dylib of an mlx-metal wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Library(archive.read("mlx/lib/libmlx.dylib"))
