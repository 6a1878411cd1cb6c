"""A small hook (guest/hook.cpp), built as it must be and in ways that are wrong.

What it is of lies in src/cpp/objc, so that the Blocks are those of the real hooks.
"""

from __future__ import annotations

from pathlib import Path

from .setup import native
from .setup.places import CACHE, HERE, ROOT, digest

PLACE = CACHE / "samples"
SOURCES = ROOT / "src" / "cpp"
BLOCK = Path("objc") / "block.h"
FRAME = HERE / "guest" / "frame.c"
HOOK = (HERE / "guest" / "hook.cpp", SOURCES / "objc" / "runtime.cpp")
WITHOUT_TABLES = ["-fno-unwind-tables", "-fno-asynchronous-unwind-tables"]
# Fields of a Block's head, and where they are filled in.
INVOKE, DESCRIPTOR = "  void (*invoke)(void*, Id);\n", "  const void* descriptor;\n"
FILLED, FILLED_WRONGLY = "&call,\n             &kDescriptor}", "&kDescriptor, &call}"


def _build(
    name: str,
    *libraries: Path,
    headers: Path = SOURCES,
    of_frame: list[str] | None = None,
) -> Path:
    includes = [f"-I{place}" for place in dict.fromkeys((headers, SOURCES))]
    text = digest(sorted([*SOURCES.glob("objc/*.h"), *headers.glob("objc/*.h")]))
    options = [*native.MACOS, "-O1", "-std=c++20", "-fvisibility=hidden", *includes]
    options += [f"-DHEADERS={text[:16]}"]
    sources = [(file, options) for file in HOOK]
    sources += [(FRAME, [*native.MACOS, "-O1", *(of_frame or [])])]
    PLACE.mkdir(parents=True, exist_ok=True)
    return native.build(PLACE / f"{name}.dylib", f"/{name}.dylib", sources, *libraries)


def as_it_must_be() -> Path:
    return _build("hook", native.CXXRT)


def with_a_libcxx_of_its_own() -> Path:
    """Linked with the objects of libc++ and libc++abi, as zig does by itself."""
    own = sorted(native.CXXRT.with_suffix(".objects").glob("*.o"))
    return _build("own-libcxx", *own)


def with_a_wrong_block_layout() -> Path:
    """Two fields of a Block's head in the wrong order."""
    text = (SOURCES / BLOCK).read_text()
    assert INVOKE + DESCRIPTOR in text and FILLED in text
    wrong = text.replace(INVOKE + DESCRIPTOR, DESCRIPTOR + INVOKE)
    header = PLACE / "include" / BLOCK
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(wrong.replace(FILLED, FILLED_WRONGLY))
    return _build("block-layout", native.CXXRT, headers=PLACE / "include")


def with_a_frame_without_tables() -> Path:
    return _build("no-tables", native.CXXRT, of_frame=WITHOUT_TABLES)
