"""What tools/check_wheel.py refuses, as behaviour: a wheel that is linked wrongly.

Changes are made in the bytes of our real extension module, which is signed again, or a
small hook is built wrongly (wrongly_built.py). It loads, and then what the rule guards
goes wrong.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from support.programs import program

from . import wrongly_built
from .runner import Machine
from .samples import changed, commands, signed_again
from .setup.packages import get_ours
from .setup.places import CACHE, MAIN, PYTHONS
from .test_loader import OURS

SECTION, SEGMENT = 80, 72


def section(raw: bytes, name: bytes) -> tuple[int, int]:
    """(offset, size) of a section of __TEXT."""
    at = commands(raw)[0x19]
    (count,) = struct.unpack_from("<I", raw, at + 64)
    for i in range(count):
        start = at + SEGMENT + SECTION * i
        if raw[start : start + 16].rstrip(b"\0") == name:
            _, size, offset = struct.unpack_from("<2QI", raw, start + 32)
            return offset, size
    raise AssertionError(f"no section {name!r}")


def unchanged(raw: bytes) -> bytes:
    return raw


def without_unwind_tables(raw: bytes) -> bytes:
    """`__unwind_info` without an entry for any function."""
    offset, size = section(raw, b"__unwind_info")
    return changed(raw, offset + 4, bytes(size - 4))


def without_exception_tables(raw: bytes) -> bytes:
    """`__gcc_except_tab` whose call sites catch nothing."""
    offset, size = section(raw, b"__gcc_except_tab")
    return changed(raw, offset, bytes(size))


def bound(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """What binds to `old` binds to `new`."""
    assert len(old) == len(new)

    def change(raw: bytes) -> bytes:
        assert b"\0" + old + b"\0" in raw or old + b"\0" in raw
        return raw.replace(old + b"\0", new + b"\0")

    change.__name__ = old.decode()
    return change


# Were these of a libc++ of its own, they would be other objects: as here.
OTHER_TYPE = bound(b"__ZTISt13runtime_error", b"__ZTINSt3__18ios_baseE")
OTHER_PERSONALITY = bound(b"___gxx_personality_v0", b"___cxa_free_exception")

CALLS = program("mac_raises")
GOOD = ["RuntimeError", "ValueError"]


def said(change: Callable[[bytes], bytes]) -> tuple[int, list[str]]:
    """(status, lines) of a process with the changed wheel."""
    # Always of the same name: its Python files are compiled once.
    wheel = CACHE / "samples" / "wheels" / change.__name__
    shutil.rmtree(wheel, ignore_errors=True)
    shutil.copytree(get_ours(PYTHONS[MAIN]), wheel)
    module = wheel / OURS
    module.write_bytes(signed_again(change(module.read_bytes())))
    done = Machine(mlx="0.31.2", ours=wheel).run(CALLS, limit=120)
    return done.returncode, done.stdout.split()


def test_the_wheel_as_it_is() -> None:
    assert said(unchanged) == (0, GOOD)


@pytest.mark.parametrize(
    "change",
    [without_unwind_tables, without_exception_tables, OTHER_TYPE, OTHER_PERSONALITY],
    ids=lambda change: change.__name__,
)
def test_what_the_checker_refuses_goes_wrong(
    change: Callable[[bytes], bytes],
) -> None:
    status, lines = said(change)
    assert (status, lines) != (0, GOOD)
    # By a death, not by the loader's refusal.
    assert status != 2


HOOKED = program("mac_calls_a_small_hook")
BUILT: dict[Callable[[], Path], tuple[int, str, str]] = {
    wrongly_built.as_it_must_be: (0, "called 2\nRuntimeError thrown by the hook\n", ""),
    # No `catch (const std::exception&)` of libmlx's knows the type.
    wrongly_built.with_a_libcxx_of_its_own: (
        0,
        "called 2\nSystemError nanobind::detail::nb_func_error_except(): exception "
        "could not be translated!\n",
        "",
    ),
    # The simulated Metal calls what is no code.
    wrongly_built.with_a_wrong_block_layout: (-11, "", "signal 11"),
    # The unwinder does not come past the frame: std::terminate.
    wrongly_built.with_a_frame_without_tables: (
        -6,
        "called 2\n",
        "uncaught exception of type std::runtime_error: thrown by the hook",
    ),
}


@pytest.mark.parametrize("build", BUILT, ids=lambda build: build.__name__)
def test_a_hook_that_is_built(build: Callable[[], Path]) -> None:
    status, said, error = BUILT[build]
    done = Machine(mlx="0.31.2", ours=None).run(HOOKED, MACHRUN_HOOK=str(build()))
    assert (done.returncode, done.stdout) == (status, f"loaded 0\n{said}"), done.stderr
    assert error in done.stderr
