"""What ziglang compiles: the loader for Linux, everything else for macOS.

cxxrt.dylib is libc++, libc++abi and libunwind from the sources that ziglang carries:
compiled for aarch64-macos they have the layouts of Apple's own.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lief
import ziglang

from .places import (
    CACHE,
    HERE,
    LOADER,
    PRELOADED,
    ROOT,
    digest,
    fresh,
    is_current,
    made,
    run,
)

ZIG = Path(ziglang.__file__).parent / "zig"
LIB = ZIG.parent / "lib"
MACOS = ["-target", "aarch64-macos.14.0", "-g0", "-fno-sanitize=undefined"]
LINUX = ["-target", "aarch64-linux-gnu.2.36", "-O1", "-g0", "-fno-sanitize=undefined"]
CXXRT, SYSTEM = CACHE / "cxxrt.dylib", CACHE / "system.dylib"
METALSIM, ACCELERATE = CACHE / "metalsim.dylib", CACHE / "accelerate.dylib"
JOBS = 2

QUIET = ["-w", "-fvisibility=default"]
LIBCXX = [
    *("-std=c++23", "-D_LIBCPP_BUILDING_LIBRARY", "-DLIBCXX_BUILDING_LIBCXXABI"),
    *("-D_LIBCXXABI_BUILDING_LIBRARY", "-DLIBC_NAMESPACE=__llvm_libc_common_utils"),
    *(f"-I{LIB / part}" for part in ("libcxx/src", "libcxxabi/src", "libcxx/libc")),
    f"-I{LIB / 'libcxxabi/include'}",
]
LIBUNWIND = [f"-I{LIB / 'libunwind/include'}", "-D_LIBUNWIND_IS_NATIVE_ONLY"]
LIBUNWIND += ["-DNDEBUG", "-fno-rtti", "-fno-exceptions"]
LIBUNWIND_SOURCES = (
    *("libunwind.cpp", "UnwindLevel1.c", "UnwindLevel1-gcc-ext.c"),
    *("UnwindRegistersRestore.S", "UnwindRegistersSave.S"),
)


# Those whose structures and numbers the shims know.
APPLE = (
    *("ctype", "dirent", "dlfcn", "errno", "fcntl", "libproc", "limits", "locale"),
    *("netdb", "netinet/tcp", "pthread", "signal", "sys/mman", "sys/socket"),
    *("sys/stat", "sys/statvfs", "sys/ucontext", "sys/utsname", "time", "unistd"),
)
# A name that is no word of C's, and not in quotes.
NAME = re.compile(
    r'"(?:\\.|[^"\\])*"|'
    r"\b(?!(?:__asm__|__builtin_\w+|__const|__inline|__restrict|__uint128_t|__volatile__|_Bool"
    r"|_Nonnull|_Noreturn|_Nullable|_Static_assert|break|case|char|const|default|define|do|double|else|enum"
    r"|extern|float|for|goto|if|inline|int|long|pack|pop|pragma|push|register|restrict"
    r"|return|short|signed|sizeof|static|struct|switch|typedef|union|unsigned|void"
    r"|volatile|while)\b)[A-Za-z_]\w*"
)


def zig(*arguments: object, into: Path) -> None:
    """Runs zig; at a low priority, since other programs run meanwhile.

    The file appears whole: an older one may be mapped by a process that runs.
    """
    cache = str(CACHE / "zig")
    new = into.with_name("new-" + into.name)
    output = [f"-femit-bin={new}"] if arguments[0] == "build-obj" else ["-o", new]
    run(
        *("nice", "-n", "10", ZIG, *arguments, *output),
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache},
    )
    new.replace(into)


def _objects(target: Path, sources: list[tuple[Path, list[str]]]) -> list[Path]:
    """Compiles sources, each with its own options, into objects next to ``target``."""
    place = target.with_suffix(".objects")
    place.mkdir(parents=True, exist_ok=True)

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        source, options = item
        unit = place / f"{source.parent.name}-{source.name}.o"
        stamp = digest([source, *options])
        if not is_current(unit, stamp):
            compiler = "c++" if source.suffix == ".cpp" else "cc"
            zig(compiler, *options, "-c", source, into=unit)
            made(unit, stamp)
        return unit

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(compile_one, sources))


def _dylib(target: Path, name: str, objects: list[Path], *libraries: Path) -> None:
    """Links a dylib, each of whose imports names the library that it is from."""
    options = [*MACOS, "-shared", "-nostdlib++", f"-Wl,-install_name,{name}"]
    zig("c++", *options, *objects, *libraries, into=target)


def build(
    target: Path, name: str, sources: list[tuple[Path, list[str]]], *libraries: Path
) -> Path:
    """A dylib from sources, if one of them or an option has changed."""
    parts: list[Path | str] = [source for source, _ in sources]
    parts += [option for _, options in sources for option in options]
    stamp = digest([*parts, *(path.name for path in libraries)])
    if not is_current(target, stamp):
        _dylib(target, name, _objects(target, sources), *libraries)
        made(target, stamp)
    return target


def build_cxxrt() -> Path:
    """libc++ and libc++abi as one dylib for macOS."""
    libcxx = LIB / "libcxx/src"
    files = [*libcxx.glob("*.cpp"), *libcxx.glob("filesystem/*.cpp")]
    files += [*libcxx.glob("ryu/*.cpp"), *(LIB / "libcxxabi/src").glob("*.cpp")]
    files = sorted(f for f in files if "noexception" not in f.name)
    options = [*MACOS, "-O1", *QUIET, *LIBCXX]
    return build(CXXRT, "/usr/lib/libc++.1.dylib", [(f, options) for f in files])


def build_system() -> Path:
    """The unwinder, and what calls a signal's handler."""
    options = [*MACOS, "-O1", *QUIET]
    sources = [(HERE / "loader" / "sigtramp.S", MACOS)]
    for name in LIBUNWIND_SOURCES:
        standard = ["-std=c++20"] if name.endswith(".cpp") else []
        source = LIB / "libunwind/src" / name
        sources.append((source, [*options, *LIBUNWIND, *standard]))
    return build(SYSTEM, "/usr/lib/system/libunwind.dylib", sources)


def build_metalsim() -> Path:
    """The simulated Metal, from the sources that are built for Linux, too."""
    place = ROOT / "tests" / "metalsim"
    options = [*MACOS, "-O1", "-std=c++20", "-fvisibility=hidden"]
    headers = sorted(place.glob("**/*.h"))
    options += [f"-DMETALSIM_HEADERS={digest(headers)[:16]}"]
    sources = [(f, options) for f in sorted(place.glob("src/*.cpp"))]
    return build(METALSIM, "/metalsim.dylib", sources, CXXRT)


def build_accelerate() -> Path:
    """The few functions of Accelerate that a small model needs."""
    sources = [(f, [*MACOS, "-O2"]) for f in sorted(HERE.glob("accelerate/*.c"))]
    return build(ACCELERATE, "/accelerate.dylib", sources)


def apple_text(prefix: str) -> str:
    """Apple's headers as one, each name behind a prefix: so Linux's go beside them."""
    source, into = CACHE / "apple.c", CACHE / "apple.i"
    source.write_text("".join(f"#include <{name}.h>\n" for name in APPLE))
    # Attributes are of functions, and of structures that no shim has.
    options = [*MACOS, "-fno-blocks", "-E", "-D__attribute__(x)=", "-D__asm(x)="]
    zig("cc", *options, "-P", source, into=into)
    text = into.read_text()
    zig("cc", *options, "-dM", source, into=into)
    # Macros without arguments.
    text += "\n".join(re.findall(r"^#define \w+ .+", into.read_text(), re.M)) + "\n"
    return NAME.sub(lambda m: m[0] if m[0][0] == '"' else prefix + m[0], text)


def pairs(name: str, numbers: Iterable[str], text: str) -> str:
    """A macro: the numbers that Linux, as this Python has it, and ``text`` have."""
    known = set(re.findall(r"^#define apple_(\w+)", text, re.M))
    both = sorted(known.intersection(numbers))
    return f"#define {name} {', '.join(f'PAIR({number})' for number in both)}\n"


def build_loader() -> Path:
    """The loader, for aarch64 Linux; it reads Mach-O by Apple's own headers.

    As a program, and as a library that is preloaded into one (start.c).
    """
    place = HERE / "loader"
    sources = sorted(f for f in place.glob("*.c") if f.name != "start.c")
    headers = CACHE / "headers"
    options = [*LINUX, "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{headers}"]
    stamp = digest([*sorted(place.glob("*.[chz]*")), Path(__file__), *options])
    if not is_current(LOADER, stamp):
        fresh(headers)
        (headers / "mach-o").symlink_to(LIB / "libc/include/any-darwin-any/mach-o")
        text = "#pragma GCC system_header\n" + apple_text("apple_")
        text += pairs("ERRNO_PAIRS", dir(errno), text)
        text += pairs("SIGNAL_PAIRS", signal.Signals.__members__, text)
        (headers / "apple.h").write_text(text)
        hashes = CACHE / "sha256.o"
        fast = ["-O", "ReleaseFast", "-fPIC"]
        zig("build-obj", *LINUX[:2], *fast, place / "sha256.zig", into=hashes)
        rest = [*sources, hashes, "-lm", "-ldl", "-lpthread"]
        preloaded = ["-fPIC", "-shared", place / "start.c"]
        zig("cc", *options, *preloaded, *rest, into=PRELOADED)
        zig("cc", *options, "-rdynamic", *rest, into=LOADER)
        made(LOADER, stamp)
    return LOADER


def shims() -> set[str]:
    """The names of libSystem and Python that the loader has as functions of its own."""
    program = lief.ELF.parse(str(LOADER))
    assert program is not None
    names = {str(symbol.name) for symbol in program.dynamic_symbols if symbol.value}
    return {name[4:] for name in names if name.startswith("mac_")}
