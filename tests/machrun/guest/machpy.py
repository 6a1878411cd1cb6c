"""Runs inside machrun: imports Mach-O extension modules, and reaches the simulator.

The loader's C functions are in the program itself. A file is taken for macOS's by
its first bytes, since `.abi3.so` may be of either system.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import machinery
from pathlib import Path
from types import ModuleType

MACH_O = b"\xcf\xfa\xed\xfe"
_program = ctypes.CDLL(None)
_load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(("machrun_load", _program))
_symbol = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("machrun_symbol", _program)
)
_any = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(("machrun_any", _program))


class MachLoader:
    """Imports an extension module with multi-phase initialisation (PEP 489)."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path

    def create_module(self, spec: machinery.ModuleSpec) -> ModuleType:
        image = _load(os.fsencode(self.path))
        name = "_PyInit_" + self.name.rpartition(".")[2]
        start = _symbol(image, name.encode())
        if not start:
            raise ImportError(f"{self.path} does not export {name}")
        self._definition = ctypes.PYFUNCTYPE(ctypes.c_void_p)(start)()
        make = ctypes.pythonapi.PyModule_FromDefAndSpec2
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_int]
        return make(self._definition, spec, sys.api_version)

    def exec_module(self, module: ModuleType) -> None:
        run = ctypes.pythonapi.PyModule_ExecDef
        run.argtypes = [ctypes.py_object, ctypes.c_void_p]
        run(module, self._definition)  # ctypes raises what it has set
        if self.name == "mlx.core" and (memory := os.environ.get("MACHRUN_MEMORY")):
            limit_memory(int(memory))
        if self.name == "mlx.core" and os.environ.get("MACHRUN_DEVICE") == "cpu":
            # Where numbers must be right: no kernel of the GPU computes anything.
            module.set_default_device(module.cpu)
            # mlx-lm 0.31.3 asks the default device for what only the GPU's has.
            info = module.device_info
            module.device_info = lambda device=module.gpu: info(device)


def _loader(name: str, path: str) -> object:
    with Path(path).open("rb") as file:
        mac = file.read(4) == MACH_O
    return (MachLoader if mac else machinery.ExtensionFileLoader)(name, path)


def install() -> None:
    """Also says, where a program asks, how it is started again."""
    mac = f".cpython-{sys.version_info[0]}{sys.version_info[1]}-darwin.so"
    suffixes = [mac, *machinery.EXTENSION_SUFFIXES]
    hook = machinery.FileFinder.path_hook(
        (_loader, suffixes),
        (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    sys.executable = os.environ.get("MACHRUN_EXECUTABLE", sys.executable)


def simulator(name: str, result: object, *arguments: object) -> object:
    """A function of tests/metalsim/metalsim.h, by its name."""
    address = _any(b"_" + name.encode())
    if not address:
        raise LookupError(f"the simulated Metal has no {name}, or is not loaded yet")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def fail(nth: int, code: int = 8, persistent: bool = False, late_us: int = 0) -> None:
    """The nth command buffer from now fails (`metalsim_plan_fail`)."""
    kinds = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint32)
    simulator("metalsim_plan_fail", None, *kinds)(nth, code, persistent, late_us)


def slow_pipelines(us: int) -> None:
    """Making a pipeline takes so long (`metalsim_set_pipeline_delay_us`)."""
    simulator("metalsim_set_pipeline_delay_us", None, ctypes.c_uint32)(us)


def limit_memory(size: int) -> None:
    """The GPU has so many bytes; more in all live buffers, and work fails (code 8)."""
    kinds = (ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
    simulator("metalsim_set_memory", None, *kinds)(1, size, 0)


def failed_buffers() -> int:
    """How many command buffers have failed in this process."""
    totals = (ctypes.c_uint64 * 32)()
    simulator("metalsim_get_totals", None, ctypes.c_void_p)(totals)
    return totals[3]


def planned_here() -> int:
    """How many command buffers of this thread were planned to fail."""
    return simulator("metalsim_plan_struck_here", ctypes.c_uint64)()
