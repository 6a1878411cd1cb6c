"""The checker passes what was built, and finds each thing that is changed in it."""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import check_wheel
import lief
import pytest

Contents = dict[str, bytes]


def changed(wheel: Path, to: Path, change: Callable[[Contents], None]) -> Path:
    """A copy of a wheel with other contents and a RECORD that is right for them."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
        modes = {entry.filename: entry.external_attr for entry in archive.infolist()}
    record = next(name for name in files if name.endswith("/RECORD"))
    before = files[record]
    change(files)
    if files.get(record) == before:
        rows = []
        for name, data in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            rows.append(f"{name},sha256={digest.decode().rstrip('=')},{len(data)}")
        rows = [row for row in rows if not row.startswith(record)]
        files[record] = "\n".join([*rows, f"{record},,\n"]).encode()
    copy = to / wheel.name
    with zipfile.ZipFile(copy, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = modes.get(name, 0o100644 << 16)
            archive.writestr(entry, data)
    return copy


def extension(files: Contents) -> str:
    return next(name for name in files if name.endswith(".so"))


def replacing(old: bytes, new: bytes) -> Callable[[Contents], None]:
    def change(files: Contents) -> None:
        name = extension(files)
        assert old in files[name] and len(old) == len(new)
        files[name] = files[name].replace(old, new)

    return change


def _command(raw: bytes, wanted: int) -> int:
    """Offset of a load command."""
    at = 32
    for _ in range(struct.unpack_from("<I", raw, 16)[0]):
        command, size = struct.unpack_from("<2I", raw, at)
        if command == wanted:
            return at
        at += size
    raise AssertionError(f"no load command {wanted:#x}")


def patching(where: Callable[[bytes], int], value: int) -> Callable[[Contents], None]:
    """Writes a 32-bit number into the extension."""

    def change(files: Contents) -> None:
        name = extension(files)
        raw = bytearray(files[name])
        struct.pack_into("<I", raw, where(bytes(raw)), value)
        files[name] = bytes(raw)

    return change


def section(name: str) -> Callable[[bytes], int]:
    """The file offset of a Mach-O section."""

    def where(raw: bytes) -> int:
        parsed = lief.MachO.parse(raw)
        assert parsed is not None
        return int(parsed.at(0).get_section(name).offset)

    return where


def adding(name: str, data: bytes) -> Callable[[Contents], None]:
    return lambda files: files.update({name: data})


def without(suffix: str) -> Callable[[Contents], None]:
    def change(files: Contents) -> None:
        del files[next(name for name in files if name.endswith(suffix))]

    return change


def wrong_record(files: Contents) -> None:
    record = next(name for name in files if name.endswith("/RECORD"))
    files[record] = files[record].replace(b"sha256=", b"sha256=A", 1)


def appended(suffix: str, data: bytes) -> Callable[[Contents], None]:
    def change(files: Contents) -> None:
        files[next(name for name in files if name.endswith(suffix))] += data

    return change


def without_python(files: Contents) -> None:
    name = next(name for name in files if name.endswith("/METADATA"))
    files[name] = files[name].replace(b"Requires-Python: >=3.10\n", b"")


def cut(size: int) -> Callable[[Contents], None]:
    def change(files: Contents) -> None:
        files[extension(files)] = files[extension(files)][:size]

    return change


def emptied(suffix: str) -> Callable[[Contents], None]:
    def change(files: Contents) -> None:
        files[next(name for name in files if name.endswith(suffix))] = b""

    return change


def wrong_tag(files: Contents) -> None:
    name = next(name for name in files if name.endswith("/WHEEL"))
    files[name] = files[name].replace(b"Tag: cp312-abi3-", b"Tag: cp313-abi3-")


ANY = {
    "a file too many": (adding("mlx_safe/x.dylib", b"x"), "does not belong here"),
    "a module too few": (without("server/serve.py"), "serve.py is missing"),
    "no requirements": (emptied("/METADATA"), "METADATA requires [] for server"),
    "no command": (emptied("/entry_points.txt"), "not the command mlx-safe"),
    "a command too many": (
        appended("/entry_points.txt", b"pip = x:main\n"),
        "not the command mlx-safe",
    ),
    "other sources": (
        appended("mlx_safe/_faults.py", b"\n"),
        "_faults.py is not what the source tree has",
    ),
    "another license": (emptied("/LICENSE"), "LICENSE is not what the source tree"),
    "no stub": (without("_core.pyi"), "_core.pyi is missing"),
    "no types": (without("py.typed"), "py.typed is missing"),
    "outside": (adding("../../x.py", b""), "../../x.py does not belong here"),
    "any Python": (without_python, "the Requires-Python None, not >=3.10"),
    "no text": (appended("/METADATA", b"\xff"), "cannot be read: UnicodeDecodeError"),
    "no text in RECORD": (
        appended("/RECORD", b"\xff\n"),
        "cannot be read: UnicodeDecodeError",
    ),
    "cut at once": (cut(100), "_core"),
    "cut in the middle": (cut(60_000), "_core"),
    "an empty extension": (cut(0), "not a"),
    "no extension": (without(".so"), "is missing"),
    "wrong RECORD": (wrong_record, "is not what RECORD says"),
    "wrong tag": (wrong_tag, "WHEEL has the tags"),
}
# LC_BUILD_VERSION's minimum is its fourth number, a library's version its fifth.
MACOS = {
    "another architecture": (patching(lambda _: 4, 0x01000007), "not for arm64"),
    "a later macOS": (
        patching(lambda raw: _command(raw, 0x32) + 12, 15 << 16),
        "MACOS 15.0.0, not for macOS from 14.0",
    ),
    "an unknown load command": (
        patching(lambda raw: _command(raw, 0x2A), 0x8000001C),
        "unknown load command RPATH",
    ),
    "another C++ library": (
        replacing(b"/usr/lib/libc++.1.dylib", b"/usr/lib/libc++.2.dylib"),
        "not libSystem and libc++ alone",
    ),
    "an exception type of its own": (
        replacing(b"__ZTISt13runtime_error\0", b"__ZTISt13runtime_errox\0"),
        "__ZTISt13runtime_error binds to nothing",
    ),
    "a name outside the stable ABI": (
        replacing(b"_PyErr_Clear\0", b"_PyErr_Cleax\0"),
        "PyErr_Cleax is not in Python's stable ABI",
    ),
    "a name of a later macOS": (
        replacing(b"_sigaction\0", b"_strchrnul\0"),
        "_strchrnul is not known to be in the /usr/lib/libSystem.B.dylib",
    ),
    "no unwind table": (patching(section("__unwind_info"), 9), "has version 9"),
    "no signature": (
        patching(lambda raw: _command(raw, 0x1D), 0x2B),
        "it is not signed",
    ),
    "code changed after signing": (
        patching(section("__text"), 0),
        "is not what was signed",
    ),
}
LINUX = {
    "another machine": (patching(lambda _: 18, 62), "it is for EM_X86_64"),
    "another C++ library": (
        replacing(b"\0libstdc++.so.6\0", b"\0libxxxc++.so.6\0"),
        "it loads libxxxc++.so.6",
    ),
    "a later C library": (
        replacing(b"\0GLIBC_2.17\0", b"\0GLIBC_2.99\0"),
        "which manylinux_2_35 does not have",
    ),
    "a name outside the stable ABI": (
        replacing(b"\0PyErr_Clear\0", b"\0PyErr_Cleax\0"),
        "PyErr_Cleax is not in Python's stable ABI",
    ),
    "another export": (
        replacing(b"\0PyInit__core\0", b"\0PyInit__corx\0"),
        "it does not export PyInit__core",
    ),
}


def test_what_was_built_passes(macos_wheel: Path, linux_wheel: Path) -> None:
    for wheel in (macos_wheel, linux_wheel):
        assert list(check_wheel.problems(wheel)) == []


@pytest.mark.parametrize("case", [*ANY, *MACOS])
def test_a_changed_wheel_for_macos_is_refused(
    case: str, macos_wheel: Path, tmp_path: Path
) -> None:
    change, complaint = {**ANY, **MACOS}[case]
    found = list(check_wheel.problems(changed(macos_wheel, tmp_path, change)))
    assert any(complaint in line for line in found), found


CUT = {name: change for name, change in ANY.items() if "cut" in name}


@pytest.mark.parametrize("case", [*CUT, *LINUX])
def test_a_changed_wheel_for_linux_is_refused(
    case: str, linux_wheel: Path, tmp_path: Path
) -> None:
    change, complaint = {**CUT, **LINUX}[case]
    found = list(check_wheel.problems(changed(linux_wheel, tmp_path, change)))
    assert any(complaint in line for line in found), found


def test_a_copy_is_no_change(macos_wheel: Path, tmp_path: Path) -> None:
    copy = changed(macos_wheel, tmp_path, lambda files: None)
    assert list(check_wheel.problems(copy)) == []


def patched(wheel: Path, copy: Path, offset: int, value: int) -> Path:
    """A copy with a 16-bit number written into the first central entry."""
    raw = bytearray(wheel.read_bytes())
    struct.pack_into("<H", raw, raw.index(b"PK\1\2") + offset, value)
    copy.write_bytes(raw)
    return copy


def test_an_archive_that_cannot_be_read_is_refused(
    macos_wheel: Path, tmp_path: Path
) -> None:
    copy = tmp_path / macos_wheel.name
    for offset, value, complaint in ((8, 1, "encrypted"), (10, 99, "not supported")):
        (line,) = check_wheel.problems(patched(macos_wheel, copy, offset, value))
        assert "it cannot be read" in line and complaint in line


@pytest.mark.parametrize("mode", [0o120777, 0o100600])
def test_a_file_that_is_none_for_all_is_refused(
    mode: int, macos_wheel: Path, tmp_path: Path
) -> None:
    """A symbolic link, and a file that only the one who installs can read."""
    copy = patched(macos_wheel, tmp_path / macos_wheel.name, 40, mode)
    (line,) = check_wheel.problems(copy)
    assert line.startswith("mlx_safe/") and line.endswith("not a file for all")


def test_a_wheel_of_another_name_is_refused(macos_wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / macos_wheel.name.replace("macosx_14", "macosx_11")
    other.write_bytes(macos_wheel.read_bytes())
    assert list(check_wheel.problems(other)) == ["not the name of a wheel that we make"]


def test_a_wheel_that_is_not_there_is_refused(
    macos_wheel: Path, tmp_path: Path
) -> None:
    gone = tmp_path / macos_wheel.name
    assert list(check_wheel.problems(gone)) == ["there is no such file"]
    gone.write_bytes(macos_wheel.read_bytes()[:20_000])
    assert list(check_wheel.problems(gone)) == ["not a zip archive"]


def test_a_release_is_complete(macos_wheel: Path) -> None:
    lines = list(check_wheel.missing([macos_wheel]))
    assert len(lines) == 8 and "no wheel cp310-cp310-macosx_14_0_arm64" in lines
