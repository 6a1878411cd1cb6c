"""The loader: what it refuses, by name, and what the images may do to it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from .runner import Machine, load
from .samples import (
    CHAINED_FIXUPS,
    address_to_offset,
    changed,
    commands,
    segments,
    signed_again,
    with_chains,
)
from .setup import native
from .setup.packages import get_ours
from .setup.places import CACHE, MAIN, PYTHONS, ROOT, run

OURS = "mlx_safe/_core.cpython-311-darwin.so"


@pytest.fixture(scope="module")
def core() -> bytes:
    """The extension module in our wheel."""
    return (get_ours(PYTHONS[MAIN]) / OURS).read_bytes()


@pytest.fixture(scope="module")
def chained() -> bytes:
    """A library of our own with chained fixups, as MLX's have."""
    return with_chains()


def for_x86(raw: bytes) -> bytes:
    return changed(raw, 4, struct.pack("<I", 0x01000007))


def for_a_newer_macos(raw: bytes) -> bytes:
    return changed(raw, commands(raw)[0x32] + 12, struct.pack("<I", 26 << 16 | 2 << 8))


def for_ios(raw: bytes) -> bytes:
    return changed(raw, commands(raw)[0x32] + 8, struct.pack("<I", 2))


def of_an_unknown_fixup_format(raw: bytes) -> bytes:
    at = commands(raw)
    if 0x80000034 in at:  # the format of the imports
        (offset,) = struct.unpack_from("<I", raw, at[0x80000034] + 8)
        return changed(raw, offset + 20, struct.pack("<I", 9))
    (offset,) = struct.unpack_from("<I", raw, at[0x80000022] + 16)
    return changed(raw, offset, b"\xe0")


def with_an_unreviewed_import(raw: bytes) -> bytes:
    return raw.replace(b"\0_lseek\0", b"\0_vfork\0").replace(b"_lseek\0", b"_vfork\0")


def with_a_symbol_that_is_not_there(raw: bytes) -> bytes:
    return raw.replace(b"__ZNSt9exceptionD2Ev\0", b"__ZNSt9exceptionD7Ev\0")


def with_writable_code(raw: bytes) -> bytes:
    return changed(raw, commands(raw)[0x19] + 60, struct.pack("<I", 7))


def with_a_command_that_dyld_must_know(raw: bytes) -> bytes:
    return changed(raw, commands(raw)[0x2A], struct.pack("<I", 0x800000FF))


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def unsigned(raw: bytes) -> bytes:
    return changed(raw, commands(raw)[0x1D], struct.pack("<I", 0x26))


# ---- neighbours: what dyld or the kernel would not take, either ----------------

DYSYMTAB, LOADS, BUILD_VERSION = 0xB, 0xC, 0x32


def segment(raw: bytes, name: bytes) -> int:
    """Where the load command of a segment lies."""
    at = 32
    while raw[at + 8 : at + 24].rstrip(b"\0") != name:
        at += int.from_bytes(raw[at + 4 : at + 8], "little")
    return at


def number(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")


def with_number(raw: bytes, at: int, value: int) -> bytes:
    return changed(raw, at, struct.pack("<I", value))


def for_no_system(raw: bytes) -> bytes:
    return with_number(raw, commands(raw)[BUILD_VERSION], 0x2A)


def for_macos_by_the_older_command(raw: bytes) -> bytes:
    return with_number(raw, commands(raw)[BUILD_VERSION], 0x24)


def with_flat_names(raw: bytes) -> bytes:
    return with_number(raw, 24, number(raw, 24) & ~0x80)


def without_word_of_thread_variables(raw: bytes) -> bytes:
    return with_number(raw, 24, number(raw, 24) & ~0x800000)


def with_an_unknown_command(raw: bytes) -> bytes:
    return with_number(raw, commands(raw)[DYSYMTAB], 0x2C)  # encrypted


def with_commands_that_are_too_long(raw: bytes) -> bytes:
    return with_number(raw, 20, number(raw, 20) - 8)


def with_more_than_it_may(raw: bytes) -> bytes:
    return with_number(raw, segment(raw, b"__DATA") + 56, 1)  # maxprot


def without_its_header(raw: bytes) -> bytes:
    return changed(raw, segment(raw, b"__TEXT") + 40, struct.pack("<Q", 0x4000))


def with_a_section_of_another_segment(raw: bytes) -> bytes:
    at = segment(raw, b"__DATA") + 72 + 32
    return changed(raw, at, struct.pack("<Q", 0x4000))


def with_an_unsigned_segment(raw: bytes) -> bytes:
    """Its bytes are those behind the signed part."""
    at = segment(raw, b"__DATA")
    size = min(number(raw, at + 32), len(raw) - number(raw, commands(raw)[0x1D] + 8))
    return changed(raw, at + 40, struct.pack("<2Q", len(raw) - size, size))


def with_fixups_in_constants(raw: bytes) -> bytes:
    return with_number(raw, segment(raw, b"__DATA_CONST") + 60, 1)


def of_another_library(raw: bytes) -> bytes:
    """The first two libraries change places, and so does what is imported of them."""
    one = commands(raw)[LOADS]
    two = one + number(raw, one + 4)
    end = two + number(raw, two + 4)
    assert number(raw, two) == LOADS
    return changed(raw, one, raw[two:end] + raw[one:two])


BAD: dict[Callable[[bytes], bytes], str] = {
    for_x86: "for x86_64, not for arm64",
    for_a_newer_macos: "needs macOS 26.2, and 14.0 is pretended",
    for_ios: "for platform 2, not for macOS",
    of_an_unknown_fixup_format: "unknown fixup format: ",
    with_an_unreviewed_import: "nobody has reviewed the import _vfork of libSystem",
    with_a_symbol_that_is_not_there: r"Symbol not found: __ZNSt9exceptionD7Ev "
    r"\(expected in: /usr/lib/libc\+\+.1.dylib\)",
    with_writable_code: "segment __TEXT is writable and executable",
    with_a_command_that_dyld_must_know: "unknown load command 0x800000ff that dyld",
    truncated: "truncated: ",
    unsigned: "it is not signed: macOS does not load it",
    for_no_system: "it does not say that it is for macOS",
    for_macos_by_the_older_command: "nobody has reviewed the load command 0x24",
    with_flat_names: "its imports do not say of which library they are",
    without_word_of_thread_variables: "its header does not tell of the thread's",
    with_an_unknown_command: "nobody has reviewed the load command 0x2c",
    with_commands_that_are_too_long: "damaged: a load command behind the last",
    with_more_than_it_may: "segment __DATA asks for more than it may",
    without_its_header: "damaged: its first segment lacks the header",
    with_a_section_of_another_segment: "damaged: section __.* lies badly",
    with_an_unsigned_segment: "segment __DATA is not all signed",
    with_fixups_in_constants: "damaged: a fixup in segment __DATA_CONST, which is not",
    of_another_library: "Symbol not found|nobody has reviewed the import",
}


def refused(raw: bytes, path: Path, macos: str = "14.0") -> str:
    """The one line that says why a file does not load."""
    path.write_bytes(raw)
    done = load(path, macos=macos)
    assert done.returncode == 2, (done.returncode, done.stderr)
    (line,) = done.stderr.splitlines()
    start = f"machrun: {path}: "
    assert line.startswith(start), line
    return line[len(start) :]


@pytest.mark.parametrize("file", ["core", "chained"])
@pytest.mark.parametrize("change", BAD, ids=lambda c: c.__name__)
def test_what_is_wrong_is_named_in_one_line(
    change: Callable[[bytes], bytes],
    file: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    good = request.getfixturevalue(file)
    bad = change(good)
    assert bad != good
    if change not in (truncated, unsigned):
        bad = signed_again(bad)
    assert re.match(BAD[change], refused(bad, tmp_path / "lib.dylib"))


def chains(raw: bytes) -> tuple[int, int]:
    """Where the chained fixups lie, and in them the first segment that has any."""
    (offset,) = struct.unpack_from("<I", raw, commands(raw)[CHAINED_FIXUPS] + 8)
    starts = offset + number(raw, offset + 4)
    places = struct.unpack_from(f"<{number(raw, starts)}I", raw, starts + 4)
    return offset, starts + next(place for place in places if place)


def test_chains_that_lead_astray(chained: bytes, tmp_path: Path) -> None:
    offset, place = chains(chained)
    imports = offset + number(chained, offset + 8)
    (page,) = struct.unpack_from("<H", chained, place + 4)
    (start,) = struct.unpack_from("<Q", chained, place + 8)
    (first,) = struct.unpack_from("<H", chained, place + 22)
    at = address_to_offset(chained, segments(chained)[0][0] + start + first)
    (pointer,) = struct.unpack_from("<Q", chained, at)
    link = 0xFFF << 51
    beyond = pointer & link | 0xFFFFFFF  # no import: an address in the image
    for where, value, said in (
        (place + 4, struct.pack("<H", 0x2000), "unknown fixup format: pages of 8192"),
        (place + 8, struct.pack("<Q", start + 8), "damaged: fixups of another segment"),
        (place + 20, struct.pack("<H", 200), "truncated|damaged: fixups of another"),
        (place + 22, struct.pack("<H", page - 4), "damaged: a chain of fixups leaves"),
        (at, struct.pack("<Q", pointer | link), "damaged: a chain of fixups leaves"),
        (at, struct.pack("<Q", beyond), "damaged: a pointer to 0xfffffff, outside"),
        (imports, b"\x63", "damaged: _.* is of library 99"),
        (imports, b"\xf0", "damaged: _.* is of library -16"),
        (imports, b"\xff", r"Symbol not found: _.* \(expected in: the program\)"),
        (imports, b"\0", r"Symbol not found: _.* \(expected in: this image\)"),
    ):
        bad = signed_again(changed(chained, where, value))
        line = refused(bad, tmp_path / "lib.dylib")
        assert re.match(said, line), (said, line)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.dylib")
    for path in (tmp_path, tmp_path / "fifo.dylib"):
        done = load(path)
        said = f"machrun: {path}: it cannot be read\n"
        assert (done.returncode, done.stderr) == (2, said)


def test_a_page_that_is_not_what_was_signed(core: bytes, tmp_path: Path) -> None:
    (offset,) = struct.unpack_from("<I", core, commands(core)[0x1D] + 8)
    directory = offset + struct.unpack_from(">I", core, offset + 16)[0]
    page = 1 << core[directory + 39]
    for at in (0x4000, offset // 2, offset - 1):
        bad = changed(core, at, bytes([core[at] ^ 1]))
        line = refused(bad, tmp_path / "lib.dylib")
        assert (
            line == f"page {at // page} is not what was signed: macOS kills the process"
        )


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    for raw in (b"", b"\x7fELF" + bytes(60), b"\xcf\xfa\xed\xfe"):
        assert refused(raw, tmp_path / "lib.dylib").startswith(
            ("truncated", "not a Mach-O")
        )


def test_what_is_not_there_is_named(core: bytes, tmp_path: Path) -> None:
    path = tmp_path / "none.dylib"
    done = load(path)
    said = f"machrun: {path}: there is no such file\n"
    assert (done.returncode, done.stderr) == (2, said)
    (tmp_path / "lib.dylib").write_bytes(core)
    done = load(tmp_path / "lib.dylib", macos="next")
    said = "machrun: environment: MACHRUN_MACOS=next is not a version as 14.0\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(
    "version", ["", "14", "14.", "14abc", "-1", " 14.0", "14.999", "14.0.1", "9" * 12]
)
def test_what_is_no_version_of_macos(version: str, core: bytes, tmp_path: Path) -> None:
    (tmp_path / "lib.dylib").write_bytes(core)
    done = load(tmp_path / "lib.dylib", macos=version)
    said = f"machrun: environment: MACHRUN_MACOS={version} is not a version as 14.0\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_what_is_no_command(core: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lib.dylib"
    path.write_bytes(core)
    nothing = "command: neither --python nor a FILE to load"
    no_name = "command: -- without the name of a function"
    for words, said in (
        ([], nothing),
        (["--"], nothing),
        ([path, "--"], no_name),
        ([path, "--", "none"], f"{path}: it has no _none"),
        ([path, "--", "x" * 5000], "command: a function with a name of 5000"),
        (["--nonsense"], "--nonsense: there is no such file"),
    ):
        done = load(*words)
        assert (done.returncode, done.stderr) == (2, f"machrun: {said}\n")


# A variable; a constant, which lies in the segment of the code.
@pytest.mark.parametrize("name", ["_ZNSt3__14coutE", "_ZTSSt9exception"])
def test_what_is_no_function(name: str) -> None:
    path = CACHE / "cxxrt.dylib"
    done = load(path, call=[name])
    said = f"machrun: {path}: _{name} is no function\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_output_that_cannot_be_written() -> None:
    with Path("/dev/full").open("w") as full:
        done = load("--imports", output=full)
    said = "machrun: command: its output cannot be written\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_every_cut_of_a_file_is_refused(core: bytes, tmp_path: Path) -> None:
    (end,) = struct.unpack_from("<I", core, 20)
    for size in (31, 32, 100, 32 + end // 2, 32 + end, 0x4000, len(core) - 1):
        refused(core[:size], tmp_path / "lib.dylib")


def test_a_newer_macos_is_pretended(tmp_path: Path) -> None:
    """The same file, refused for 14 and loaded as 26."""
    good = (CACHE / "metalsim.dylib").read_bytes()
    bad = signed_again(
        changed(good, commands(good)[0x32] + 12, struct.pack("<I", 26 << 16))
    )
    path = tmp_path / "lib.dylib"
    assert refused(bad, path) == "needs macOS 26.0, and 14.0 is pretended"
    assert load(path, macos="26.0").returncode == 0


# What the shims fill in or read, by Apple's name.
STRUCTURES = (
    *(
        "struct stat",
        "struct dirent",
        "struct statvfs",
        "struct sigaction",
        "siginfo_t",
    ),
    *("stack_t", "ucontext_t", "struct __darwin_mcontext64", "struct utsname"),
    *("struct lconv", "struct rusage_info_v0", "struct sockaddr_storage"),
    *("struct addrinfo", "_RuneLocale", "pthread_mutex_t", "pthread_cond_t"),
    *("pthread_rwlock_t", "pthread_mutexattr_t"),
)


def layouts(directory: Path, target: list[str], prefix: str, text: str) -> str:
    """Clang's own words on how the structures lie in memory, by Apple's names."""
    source = directory / "layouts.c"
    for name in STRUCTURES:
        own = native.NAME.sub(lambda m: prefix + m[0], name)
        text += f"unsigned long _{len(text)} = sizeof({own});\n"
    source.write_text(text)
    options = ["-Xclang", "-fdump-record-layouts", "-w", "-c", "-o", directory / "unit"]
    # A cache of its own: what is in one already is compiled without a word.
    cache = {f"ZIG_{which}_CACHE_DIR": str(directory) for which in ("GLOBAL", "LOCAL")}
    environment = {**os.environ, **cache}
    said = run(native.ZIG, "cc", *target, *options, source, env=environment)
    parts = re.sub(rf"\b{prefix}(?=\w)", "", said).split(
        "*** Dumping AST Record Layout"
    )
    return "".join(sorted(re.sub(r" at [^)]*\)", ")", part) for part in parts))


def test_what_the_shims_know_of_macos_is_of_apples_headers(tmp_path: Path) -> None:
    """Compiled for Linux under other names, its structures lie as on macOS."""
    own = "".join(f"#include <{name}.h>\n" for name in native.APPLE)
    on_macos = layouts(tmp_path, native.MACOS, "", own)
    here = layouts(tmp_path, native.LINUX, "apple_", native.apple_text("apple_"))
    assert "struct stat\n" in here and "st_birthtimespec" in here
    assert here == on_macos


def test_code_is_not_writable_and_constants_are_not(private_reports: Path) -> None:
    """What /proc says of the images of a process that has imported everything."""
    done = Machine().run("""
        import mlx.core, mlx_safe
        print(open("/proc/self/maps").read())
    """)
    assert done.returncode == 0, done.stderr
    ends = (".dylib", "-darwin.so")
    images = [line for line in done.stdout.splitlines() if line.endswith(ends)]
    assert any("libmlx.dylib" in line for line in images)
    assert any(" r-xp " in line for line in images)
    assert not [line for line in images if re.match(r"\S+ .wx", line)]
    for path in {line.split()[-1] for line in images}:
        raw = Path(path).read_bytes()
        begin = number(raw, segment(raw, b"__DATA_CONST") + 40)  # in the file
        found = [
            line
            for line in images
            if line.endswith(path) and int(line.split()[2], 16) == begin
        ]
        assert found and all(re.match(r"\S+ r--", line) for line in found), path


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_is_run(version: str) -> None:
    """By each Python that takes it."""
    done = Machine(python=version).run("""
        import sys, mlx_safe
        from mlx_safe import _core
        print("%d.%d" % sys.version_info[:2], mlx_safe.install().verified)
        print(_core.__file__)
    """)
    assert done.stdout.split()[:2] == [version, "True"], done.stderr
    wheel = PYTHONS[version].wheel
    assert Path(done.stdout.split()[2]).is_relative_to(CACHE / "ours" / wheel)


def test_every_wheel_of_ours_is_run() -> None:
    built = {
        path.name.split("-", 2)[2].partition("-macosx")[0]
        for path in ROOT.glob("dist/mlx_safe-*-macosx_*.whl")
    }
    assert built == {python.wheel for python in PYTHONS.values()}
