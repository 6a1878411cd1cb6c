"""The KV store on disk: what it never gives, when it gives up, what goes first."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.cli import main
from mlx_safe.kv import command, directory, format, marks
from mlx_safe.kv.directory import Directory, NotOurs
from mlx_safe.kv.format import ROOT, Node, chain
from mlx_safe.kv.store import Draft, Limits, Store
from mlx_safe.kv.writer import Writer
from support.kv_files import (
    IDENTITY,
    PLENTY,
    HookedFiles,
    drafts,
    on_disk,
    opened,
    restored,
)
from support.programs import program
from support.server import eventually

TOKENS = [n % 97 for n in range(700)]  # two blocks, and 188 more
OTHER = [n % 89 for n in range(700)]
KEYS = chain(IDENTITY, TOKENS)
MADE_UP_NAME = f"b-0-256-{ROOT}-{'a' * 32}.kv"


def write(store: Store, tokens: list[int], snapshot: bool = False) -> None:
    for draft in drafts(tokens, snapshot=snapshot):
        assert store.publish(draft)


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.kv"))


def test_what_was_written_comes_back_after_a_restart(tmp_path: Path) -> None:
    first = opened(tmp_path)
    write(first, TOKENS, snapshot=True)
    first.close()
    store = opened(tmp_path)
    assert [n.end for n in restored(store, TOKENS)] == [256, 512, 700]
    assert [n.end for n in restored(store, TOKENS, states=True)] == [256, 512, 700]
    assert [n.end for n in restored(store, TOKENS[:699])] == [256, 512]
    assert not restored(store, TOKENS[:699], states=True)
    assert not restored(store, OTHER)
    assert [n.end for n in restored(store, [*TOKENS[:300], 5, *TOKENS])] == [256]
    modes = {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {0o600}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_dir()} == {
        0o700
    }
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_none_of_a_thousand_damaged_files_is_restored(tmp_path: Path) -> None:
    chance = random.Random(16)
    store = opened(tmp_path)
    write(store, OTHER, snapshot=True)
    foreign = [file.read_bytes() for file in files(tmp_path)]
    for _ in range(1000):
        write(store, TOKENS, snapshot=True)
        whole = restored(store, TOKENS, states=True)
        assert len(whole) == 3
        node = chance.choice(whole)
        file = tmp_path / IDENTITY / node.name
        file.write_bytes(data := spoiled(file.read_bytes(), foreign, chance))
        # Fails when a byte of it is another; what comes before it is still good.
        given = restored(store, TOKENS, states=True)
        assert node not in given, data
        assert not file.exists()
    assert store.events["damaged"] == 1000
    assert store.off is None


def spoiled(data: bytes, foreign: list[bytes], chance: random.Random) -> bytes:
    made = bytearray(data)
    how = chance.choice(["flip", "cut", "grow", "zeros", "foreign", "swap"])
    if how == "flip":
        made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del made[chance.randrange(len(made)) :]
    elif how == "grow":
        made += b"\0" * chance.randint(1, 5000)
    elif how == "zeros":
        begin = chance.randrange(len(made) - 64)
        made[begin : begin + 64] = b"\0" * 64 if any(made[begin : begin + 64]) else b"1"
    elif how == "foreign":
        return chance.choice(foreign)
    else:  # two halves of different files
        return bytes(made[: len(made) // 2]) + foreign[0][len(made) // 2 :]
    return bytes(made)


def forged(data: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    """With another header, whose checksum is right: somebody means it."""
    length = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[48 : 48 + length])
    change(header)
    text = json.dumps(header).encode()
    fixed = data[:12] + struct.pack("<I", len(text)) + sha256(text).digest()
    return fixed + text + data[48 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(pieces=[[-1, "0" * 64]]),
        lambda h: h.update(pieces=[[1 << 62, "0" * 64]]),
        lambda h: h.update(pieces=[[True, None]]),
        lambda h: h.update(pieces={"a": 1}),
        lambda h: h.update(pieces=None),
        lambda h: h.update(end=10**30),
        lambda h: h.update(start="0"),
        lambda h: h.update(identity="f" * 32),
        lambda h: h.pop("about"),
        lambda h: h.update(tokens="0" * 64),
    ],
)
def test_a_forged_header_is_refused(
    tmp_path: Path, change: Callable[[dict[str, object]], None]
) -> None:
    store = opened(tmp_path)
    write(store, TOKENS)
    file = tmp_path / IDENTITY / drafts(TOKENS)[1].node.name
    file.write_bytes(forged(file.read_bytes(), change))
    assert [n.end for n in restored(store, TOKENS)] == [256]
    assert store.events["damaged"] == 1
    assert store.off is None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 50_000,
        b"null",
        b"\xff\xfe",
        b'{"pieces": ' + b"9" * 6000 + b"}",
        b" " * (1 << 20),
        b'{"key": "\\ud800"}',
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    """Its checksum is right."""
    store = opened(tmp_path)
    write(store, TOKENS)
    file = tmp_path / IDENTITY / drafts(TOKENS)[1].node.name
    data = file.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    fixed = data[:12] + struct.pack("<I", len(text)) + sha256(text).digest()
    file.write_bytes(fixed + text + data[48 + length :])
    assert [n.end for n in restored(store, TOKENS)] == [256]
    assert store.events["damaged"] == 1
    assert store.off is None


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "huge", "other owner's"])
def test_what_is_no_plain_file_is_never_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "kv")
    write(store, TOKENS)
    file = tmp_path / "kv" / IDENTITY / drafts(TOKENS)[1].node.name
    data = file.read_bytes()
    if kind != "other owner's":
        file.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "huge":  # without taking any of the disk, or the memory
        with file.open("wb") as out:
            out.truncate(1 << 40)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    read = restored(store, TOKENS)
    assert [n.end for n in read] == ([] if kind == "other owner's" else [256])
    assert store.off is None
    assert kind != "link" or (tmp_path / "elsewhere").read_bytes() == data


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EMFILE]
)
def test_one_file_that_cannot_be_opened_costs_itself_alone(
    tmp_path: Path, code: int
) -> None:
    """Another user's, a link, a socket; or the process has too many files open."""

    class Guarded(HookedFiles):
        def open(self, name: str, at: int, write: bool = False) -> int:
            if name == bad:
                raise OSError(code, os.strerror(code), name)
            return super().open(name, at, write)

    bad = ""
    store = opened(tmp_path, PLENTY, Guarded(lambda _: None))
    write(store, TOKENS)
    bad = drafts(TOKENS)[1].node.name
    assert [n.end for n in restored(store, TOKENS)] == [256]
    assert store.off is None
    assert len(files(tmp_path)) == (2 if code == errno.EMFILE else 1)
    bad = ""
    write(store, TOKENS)
    assert len(restored(store, TOKENS)) == 2


def test_a_socket_and_a_device_in_a_files_place(tmp_path: Path) -> None:
    store = opened(tmp_path / "kv")
    write(store, TOKENS)
    file = tmp_path / "kv" / IDENTITY / drafts(TOKENS)[1].node.name
    file.unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{store._directory.fd}/s")
        (tmp_path / "kv" / "s").rename(file)
        assert [n.end for n in restored(store, TOKENS)] == [256]
    assert store.off is None
    assert not file.exists()


def test_without_descriptors_it_waits_and_is_not_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def fail(operation: str) -> None:
        if out and operation in ("open", "create", "directory"):
            too_many()

    out = False
    store = opened(tmp_path, PLENTY, HookedFiles(fail))
    write(store, TOKENS)
    other = Store(Directory(tmp_path, HookedFiles(fail)), PLENTY)
    nodes = [draft.node for draft in drafts(TOKENS)]
    out = True
    monkeypatch.setattr(marks, "names", too_many)
    assert store.begin_restore(nodes) is None
    assert not list(store.read([(nodes[0], 1 << 20)], TOKENS))
    assert store.find(IDENTITY, TOKENS, 700, blocks=True, states=False) is None
    assert not store.publish(drafts(OTHER)[0])
    store.drop(nodes[::-1])
    assert store.off is None
    monkeypatch.undo()
    other.open()
    out = False
    assert not restored(store, TOKENS), "what is dropped stays so"
    assert len(restored(other, TOKENS)) == 2, "it looks again"
    write(store, OTHER)


@pytest.mark.parametrize("kind", ["directory", "full directory", "link", "pipe"])
def test_what_is_named_like_a_half_written_file_and_is_none(
    tmp_path: Path, kind: str
) -> None:
    write(opened(tmp_path / "kv"), TOKENS)
    (tmp_path / "elsewhere").write_text("mine")
    place = tmp_path / "kv" / IDENTITY / "tmp-1"
    if kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
        if kind == "full directory":
            (place / "file").write_text("mine")
    store = opened(tmp_path / "kv")
    assert len(restored(store, TOKENS)) == 2
    write(store, OTHER)
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert os.path.lexists(place) == kind.endswith("directory")


def test_a_server_whose_lock_file_was_removed_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another one has made another, and neither would wait for the other."""
    store = opened(tmp_path)
    write(store, TOKENS)
    (tmp_path / "state").unlink()
    other = opened(tmp_path)
    assert not store.publish(drafts(OTHER)[0])
    assert store.off == "somebody has removed it (state)"
    write(other, OTHER)
    assert len(restored(other, TOKENS)) == 2
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_whose_name_is_another_files_content(tmp_path: Path) -> None:
    """A hard link, of another text's block, and of another model's."""
    store = opened(tmp_path)
    write(store, OTHER)
    foreign = "f" * 32
    for draft in drafts(TOKENS, identity=foreign):
        assert store.publish(draft)
    for source in (
        tmp_path / IDENTITY / drafts(OTHER)[1].node.name,
        tmp_path / foreign / drafts(TOKENS, identity=foreign)[1].node.name,
    ):
        write(store, TOKENS)
        file = tmp_path / IDENTITY / drafts(TOKENS)[1].node.name
        file.unlink()
        os.link(source, file)
        assert [n.end for n in restored(store, TOKENS)] == [256]
        assert source.exists()
    assert len(restored(store, OTHER)) == 2
    assert store.off is None


@pytest.mark.parametrize("size", [10, 60, 500])
def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, size: int) -> None:
    def read(fd: int, count: int) -> bytes:
        calls.append(count)
        if len(calls) == 2:
            os.truncate(file, size)
        return os.read(fd, count)

    calls: list[int] = []
    write(opened(tmp_path), TOKENS)
    node = drafts(TOKENS)[1].node
    file = tmp_path / IDENTITY / node.name
    with file.open("rb") as opened_file, pytest.raises(format.Damaged, match="cut"):
        format.decode(opened_file.fileno(), node, TOKENS, 1 << 20, read)


@pytest.mark.parametrize(
    "mark",
    [
        json.dumps([["../victim", MADE_UP_NAME]]),
        json.dumps([[IDENTITY, "../../victim/" + MADE_UP_NAME]]),
        json.dumps([[IDENTITY, MADE_UP_NAME + "\0"]]),
        "[" * 100_000,
        '[["a"]]',
        "null",
        f'[["{IDENTITY}", {"9" * 5000}]]',
    ],
)
def test_a_mark_that_somebody_made_removes_nothing_else(
    tmp_path: Path, mark: str
) -> None:
    write(opened(tmp_path / "kv"), TOKENS)
    victim = tmp_path / "victim" / MADE_UP_NAME
    victim.parent.mkdir()
    victim.write_text("mine")
    (tmp_path / "kv" / "marks" / "1-a").write_text(mark)
    store = opened(tmp_path / "kv")
    assert len(restored(store, TOKENS)) == 2
    assert victim.exists()
    assert not list((tmp_path / "kv" / "marks").iterdir())
    assert store.off is None


@pytest.mark.parametrize("what", ["state", "marks"])
@pytest.mark.parametrize("kind", ["link", "file", "directory", "pipe"])
def test_what_stands_in_the_place_of_its_own_things_is_named(
    tmp_path: Path, what: str, kind: str
) -> None:
    """And nothing is done to it."""
    place = tmp_path / "kv" / what
    (tmp_path / "kv").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        place.write_text("somebody's")
    elif kind == "directory":
        place.mkdir()
    else:
        os.mkfifo(place)
    if (what, kind) == ("marks", "directory"):
        assert opened(tmp_path / "kv").off is None  # as another server makes it
        return
    with pytest.raises(NotOurs) as refused:
        Directory(tmp_path / "kv")
    assert str(tmp_path / "kv") in str(refused.value)
    if what == "marks":
        assert str(place) in str(refused.value)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_names_are_shown_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\nb\x1b[31mc").write_text("mine")
    assert main(["kv", "list", str(tmp_path)]) == 2
    assert "(ab[31mc is in it)" in capsys.readouterr().err


def test_a_directory_that_is_moved_under_way_goes_on(tmp_path: Path) -> None:
    store = opened(tmp_path / "kv")
    write(store, TOKENS)
    (tmp_path / "kv").rename(tmp_path / "moved")
    write(store, OTHER)
    assert len(restored(store, OTHER)) == 2
    assert not (tmp_path / "kv").exists()
    assert len(restored(opened(tmp_path / "moved"), OTHER)) == 2


def test_a_disk_that_is_full_in_the_midst_of_a_file(tmp_path: Path) -> None:
    """It said that it had room; what is there stays, and nothing half-written."""

    class Full(HookedFiles):
        room = 1 << 30

        def write(self, fd: int, data: Any) -> None:
            view = memoryview(data).cast("B")[: self.room]
            self.room -= len(view)
            super().write(fd, view)
            if len(view) < memoryview(data).nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for room in (0, 1, 300, 1500):
        disk = Full(lambda _: None)
        path = tmp_path / str(room)
        store = opened(path, PLENTY, disk)
        write(store, TOKENS)
        disk.room = room
        assert not store.publish(drafts(OTHER)[0])
        assert store.off == os.strerror(errno.ENOSPC)
        assert not list(path.glob("*/tmp-*"))
        assert len(restored(opened(path), TOKENS)) == 2


MADE_UP = [
    f"{kind}-{start}-{end}-{parent}-{'a' * 32}.kv"
    for kind in "bs"
    for parent in (ROOT, KEYS[0], KEYS[1], "b" * 32)
    for start in (0, 1, 256, 512, 768, 10**11)
    for end in (0, 1, 255, 256, 511, 512, 700, 768, 10**11)
]


def test_names_that_somebody_made_up_find_nothing_and_break_nothing(
    tmp_path: Path,
) -> None:
    """A text of whole blocks has no block after its end."""
    store = opened(tmp_path)
    write(store, TOKENS, snapshot=True)
    for name in MADE_UP:
        (tmp_path / IDENTITY / name).write_bytes(b"made up")
    (tmp_path / IDENTITY / "about.json").mkdir()
    (tmp_path / "marks" / "directory").mkdir()
    os.mkfifo(tmp_path / "marks" / "pipe")
    store.close()
    store = opened(tmp_path)
    store.describe(IDENTITY, "{}")
    for length in (256, 512, 700):
        for states in (False, True):
            found = restored(store, TOKENS[:length], states=states)
            ends = [n for n in (256, 512, 700) if n <= length]
            expected = ends if length == 700 or not states else []
            assert [n.end for n in found] == expected
            keys = chain(IDENTITY, TOKENS[:length])
            store.snapshots(IDENTITY, keys, TOKENS[:length])
    assert store.off is None
    assert main(["kv", "check", str(tmp_path)]) == 1


@pytest.mark.parametrize("state", [b"\xff" * 24, b"", b"\0" * 24, b"\x7f" * 24])
def test_whatever_the_state_says_it_goes_on(tmp_path: Path, state: bytes) -> None:
    opened(tmp_path).close()
    (tmp_path / "state").write_bytes(b"mlxskvd1" + state)
    store = opened(tmp_path, Limits(10**9, per_hour=10**9, free=0))
    other = opened(tmp_path)
    write(store, TOKENS)
    assert len(restored(other, TOKENS)) == 2
    assert store.off is None


def test_a_mark_that_is_lifted_meanwhile_is_no_dead_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread or server, between its opening and its lock."""
    store, other = opened(tmp_path), opened(tmp_path)
    write(store, TOKENS)
    mark = store.begin_restore([d.node for d in drafts(TOKENS)])
    assert mark is not None
    lock = fcntl.flock

    def slow(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        store.end_restore(mark)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    assert len(restored(other, TOKENS)) == 2


def test_a_server_that_has_been_stopped_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Directory(tmp_path)
    monkeypatch.setattr(directory, "LOCK_WAIT_S", 0.1)
    with stopped.lock():
        store = opened(tmp_path)
        assert store.off is not None
        assert "lock" in store.off
    stopped.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("at", ["directory", "create", "write", "sync", "rename"])
def test_a_disk_that_fails_turns_it_off_with_one_warning(
    tmp_path: Path, code: int, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(operation: str) -> None:
        if broken and operation == at:
            raise OSError(code, os.strerror(code))

    broken = False
    store = opened(tmp_path, PLENTY, HookedFiles(fail))
    write(store, TOKENS)
    broken = True
    caplog.set_level(logging.WARNING)
    for draft in drafts(OTHER):
        assert not store.publish(draft)
    assert store.off == os.strerror(code)
    assert store.find(IDENTITY, TOKENS, 700, blocks=True, states=False) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert os.strerror(code) in caplog.text
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob("*/tmp-*"))


def test_what_was_used_least_goes_first_and_ends_before_beginnings(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path, Limits(4 * 4096, free=0))
    write(store, TOKENS)
    write(store, OTHER)
    for draft in drafts(TOKENS):  # as if both had been long ago, this one longer
        os.utime(tmp_path / IDENTITY / draft.node.name, ns=(1000, 1000))
    for draft in drafts(OTHER):
        os.utime(tmp_path / IDENTITY / draft.node.name, ns=(2000, 2000))
    store.close()
    store = opened(tmp_path, Limits(4 * 4096, free=0))
    third = [7] * 256
    write(store, third)
    assert [n.end for n in restored(store, TOKENS)] == [256]
    assert len(restored(store, OTHER)) == 2
    mark = store.begin_restore([drafts(TOKENS)[0].node])
    assert mark is not None
    store.end_restore(mark)
    write(store, [8] * 256)
    assert len(restored(store, TOKENS)) == 1, "it was used just now"
    assert len(restored(store, OTHER)) == 1
    assert store.nbytes == on_disk(tmp_path) == 4 * 4096


def test_after_the_clock_was_set_back_what_is_new_stays(tmp_path: Path) -> None:
    """What seems to be of the future would never go, and whatever is new at once."""
    limits = Limits(4 * 4096, free=0)
    store = opened(tmp_path, limits)
    for n in range(4):
        write(store, [n] * 256)
    in_a_year = time.time_ns() + 365 * 86400 * 10**9
    for file in files(tmp_path):
        os.utime(file, ns=(in_a_year, in_a_year))
    store.close()
    store = opened(tmp_path, limits)
    for n in range(4, 7):
        write(store, [n] * 256)
    assert [bool(restored(store, [n] * 256)) for n in range(4, 7)] == [True] * 3
    assert len(files(tmp_path)) == 4
    # One that is used again is of now.
    (old,) = [n for n in range(4) if restored(store, [n] * 256)]
    mark = store.begin_restore([drafts([old] * 256)[0].node])
    assert mark is not None
    for n in range(7, 10):
        write(store, [n] * 256)
    assert restored(store, [old] * 256)


def test_a_limit_that_was_lowered_holds_from_the_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write(store, OTHER)
    write(store, TOKENS)
    for age, tokens in enumerate((TOKENS, OTHER)):
        for draft in drafts(tokens):
            when = 10**9 * (9 - age)
            os.utime(tmp_path / IDENTITY / draft.node.name, ns=(when, when))
    store.close()
    store = opened(tmp_path, Limits(3 * 4096, free=0))
    assert store.nbytes == on_disk(tmp_path) == 3 * 4096
    assert len(restored(store, TOKENS)) == 2
    assert [n.end for n in restored(store, OTHER)] == [256]
    store.close()
    opened(tmp_path, Limits(1, free=0)).close()
    assert not files(tmp_path)


@pytest.mark.parametrize("what", ["all of it", "a model's", "marks"])
def test_a_directory_that_is_removed_under_way(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path / "kv")
    write(store, TOKENS)
    gone = {"all of it": "", "a model's": IDENTITY, "marks": "marks"}[what]
    shutil.rmtree(tmp_path / "kv" / gone)
    nodes = [draft.node for draft in drafts(TOKENS)]
    mark = store.begin_restore(nodes)
    assert (mark is not None) == (what == "a model's")
    if mark is not None:
        assert not list(store.read([(nodes[0], 1 << 20)], TOKENS))
        store.end_restore(mark)
    assert not restored(store, TOKENS)
    for draft in drafts(OTHER):
        assert store.publish(draft) == (what == "a model's")
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == (what != "a model's")
    if what == "all of it":
        assert "somebody has removed it" in warned[0].getMessage()


def test_a_directory_of_another_version_is_said_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(opened(tmp_path), TOKENS)
    state = tmp_path / "state"
    state.write_bytes(b"mlxskvd0" + state.read_bytes()[8:])
    for command_line in (["kv", "list", str(tmp_path)], ["kv", "empty", str(tmp_path)]):
        assert main(command_line) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "is of another version of mlx-safe; give an empty directory" in said
    assert len(files(tmp_path)) == 2


def test_files_of_an_older_format_are_not_used(tmp_path: Path) -> None:
    store = opened(tmp_path)
    write(store, TOKENS)
    for file in files(tmp_path):
        data = file.read_bytes()
        file.write_bytes(data[:8] + struct.pack("<I", 0) + data[12:])
    assert not restored(store, TOKENS)
    assert store.events["damaged"] == 1
    assert store.publish(drafts(TOKENS)[0])


def test_another_servers_use_counts(tmp_path: Path) -> None:
    here, there = (opened(tmp_path, Limits(2 * 4096, free=0)) for _ in range(2))
    write(here, [1] * 256)
    write(here, [2] * 256)
    for file in files(tmp_path):
        os.utime(file, ns=(1000, 1000))
    for store in (here, there):
        store.drop([])
        store._seen = store._settled = -1  # looks again
        store.open()
    mark = there.begin_restore([drafts([1] * 256)[0].node])
    assert mark is not None
    write(here, [3] * 256)
    assert restored(here, [1] * 256)
    assert not restored(here, [2] * 256)


def test_it_writes_no_more_than_so_much_an_hour(tmp_path: Path) -> None:
    limits = Limits(10**9, per_hour=3 * 4096, free=0)
    write(store := opened(tmp_path, limits), TOKENS)
    store.close()
    store = opened(tmp_path, limits)  # a restart gives no more
    written = [store.publish(d) for d in [*drafts([1] * 256), *drafts([2] * 256)]]
    assert written == [True, False]
    assert store.events["not_written_hourly"] == 1


def test_it_leaves_room_on_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Small(HookedFiles):
        free = 10 * 4096

        def free_bytes(self, at: int) -> tuple[int, int]:
            return self.free, 1 << 40

    disk = Small(lambda _: None)
    store = opened(tmp_path, Limits(10**9, free=3 * 4096), disk)
    write(store, TOKENS)
    disk.free = 3 * 4096  # others have filled it: ours gives way
    write(store, [1] * 256)
    assert len(files(tmp_path)) == 2
    disk.free = 0
    for _ in range(2):
        assert not store.publish(drafts(OTHER)[0])
    assert store.off is None
    assert caplog.messages == [
        "KV caches are not written: 0 B free on the volume of --kv-dir, and "
        "--kv-free-bytes leaves 12.3 kB to others"
    ]


def test_a_full_volume_is_said_after_a_limit_that_was_too_small(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(HookedFiles):
        free = 1 << 30

        def free_bytes(self, at: int) -> tuple[int, int]:
            return self.free, 1 << 40

    disk = Full(lambda _: None)
    store = opened(tmp_path, Limits(100, free=3 * 4096), disk)
    assert not store.publish(drafts(TOKENS)[0]), "no file is so small"
    assert not caplog.messages
    disk.free = 0
    for _ in range(2):
        assert not store.publish(drafts(TOKENS)[0])
    assert len(caplog.messages) == 1
    assert "0 B free on the volume of --kv-dir" in caplog.messages[0]


def test_what_is_left_free_by_default_fits_the_volume() -> None:
    assert Limits(1).floor(10**12) == 10 * 10**9
    assert Limits(1).floor(5 * 10**9) == 5 * 10**8
    assert Limits(1, free=10**11).floor(10**12) == 10**11
    assert Limits(1, free=0).floor(10**12) == 0


def test_a_directory_with_other_things_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    tmp_path.chmod(0o755)
    for make in (True, False):
        with pytest.raises(NotOurs, match=r"thesis\.txt"):
            Directory(tmp_path, make=make)
    assert tmp_path.stat().st_mode & 0o777 == 0o755, "others may go on using it"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "state").touch()
    with pytest.raises(NotOurs, match=r"thesis\.txt"):
        Directory(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotOurs):
        Directory(tmp_path / "file")


def test_the_command_lists_checks_and_empties(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = opened(tmp_path / "kv")
    write(store, TOKENS)
    store.describe(IDENTITY, '{"name": "some-model"}')
    where = str(tmp_path / "kv")
    assert main(["kv", "list", where]) == 0
    assert "2 files  8.2 kB  texts of up to 512 tokens" in (
        said := capsys.readouterr().out
    )
    assert "some-model" in said
    assert main(["kv", "check", where]) == 0
    file = files(tmp_path / "kv")[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["kv", "check", where]) == 1
    assert f"{file.name}: " in capsys.readouterr().out
    assert main(["kv", "empty", where]) == 0
    assert not files(tmp_path / "kv")
    assert not restored(store, TOKENS)  # a server that runs goes on with none
    assert store.publish(drafts(TOKENS)[0])
    (tmp_path / "empty").mkdir()
    missing = f"{tmp_path}/a\nb"
    for name in (str(tmp_path), str(tmp_path / "empty"), str(file), "", missing):
        for what in ("list", "check", "empty"):
            assert main(["kv", what, name]) == 2
            said = capsys.readouterr().err
            assert said.startswith("mlx-safe: ")
            assert said.count("\n") == 1
    assert not list((tmp_path / "empty").iterdir())


def test_the_command_names_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(opened(tmp_path), TOKENS)
    broken = files(tmp_path)[0].name
    plain = format.check

    def check(fd: int, node: Node) -> None:
        if node.name == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(fd, node)

    monkeypatch.setattr(command, "check", check)
    assert main(["kv", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{broken}: {os.strerror(errno.EIO)}" in said
    assert "2 files, 1 damaged" in said


# -- the writer and the epoch ----------------------------------------------------


@pytest.mark.parametrize("operation", ["before", "create", "write", "date", "sync"])
def test_a_stray_write_withdraws_what_is_not_published(
    tmp_path: Path, operation: str
) -> None:
    armed = False

    def hook(name: str) -> None:
        nonlocal armed
        if armed and name == operation:
            armed = False
            failing = threading.Thread(target=lambda: writer.fail(all_of_it=True))
            failing.start()
            failing.join(60)
            assert not failing.is_alive()

    store = opened(tmp_path, PLENTY, HookedFiles(hook))
    writer = Writer(store)
    for draft in drafts(TOKENS):
        assert writer.offer(draft, 7)
    writer.confirm(7)
    armed = True
    if operation == "before":
        hook("before")
    while writer.write_one():
        pass
    assert not armed
    assert files(tmp_path) == []
    assert writer.waiting == 0
    assert not list(tmp_path.glob("*/tmp-*"))


def test_only_what_a_later_point_of_its_epoch_confirms_is_written(
    tmp_path: Path,
) -> None:
    writer = Writer(store := opened(tmp_path))
    first, second = drafts(TOKENS)
    assert writer.offer(first, 7)
    assert not writer.write_one()
    writer.confirm(7)
    assert writer.offer(second, 7)
    writer.fail(all_of_it=False)  # a fault that wrote nowhere
    assert writer.write_one()
    assert not writer.write_one()
    assert [n.end for n in restored(store, TOKENS)] == [256]
    assert writer.offer(second, 7)
    writer.confirm(8)
    assert not writer.write_one()
    assert [n.end for n in restored(store, TOKENS)] == [256]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def snapshot(length: int, tokens: list[int] = TOKENS) -> Draft:
    return drafts(tokens[:length], snapshot=True)[-1]


def waiting(writer: Writer) -> list[int]:
    return [draft.node.end for draft in writer._drafts()]


def test_what_is_held_is_written_when_it_is_released_and_not_otherwise(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    writer = Writer(store)
    first, second = snapshot(100), snapshot(110)
    other = snapshot(100, OTHER)
    assert writer.hold(first, 7, 1)
    assert writer.unconfirmed
    writer.confirm(7)
    assert not writer.unconfirmed
    assert not writer.write_one()
    assert writer.hold(second, 7, 1), "in the place of the first"
    assert writer.hold(other, 7, 2)
    writer.confirm(7)
    writer.let_go(2)
    writer.release()
    assert waiting(writer) == [110]
    assert writer.write_one()
    # One that no later point has confirmed goes, as after any fault.
    assert writer.hold(first, 7, 1)
    writer.release(1)
    assert writer.hold(first, 7, 2)
    writer.fail(all_of_it=False)
    assert writer.hold(first, 7, 3)
    writer.confirm(8)
    assert writer.hold(first, 8, 4)
    writer.confirm(8)
    writer.fail(all_of_it=True)  # it may have written anywhere
    writer.release()
    assert not writer.write_one()
    assert writer.waiting == 0
    assert not Writer(store, backlog=100).hold(first, 7, 1), "half of it at most"


def test_what_may_wait_makes_way_for_the_next_of_its_text(tmp_path: Path) -> None:
    """And is written when none has come for so long."""
    clock = Clock()
    writer = Writer(opened(tmp_path), clock=clock)
    for length in (100, 110, 120):
        assert writer.hold(snapshot(length), 7, 1, 10.0)
        writer.confirm(7)
        writer.let_go(1)  # its request has ended
        clock.now += 9
        assert not writer.write_one()
    assert writer.due(IDENTITY, TOKENS) == [snapshot(120).node]
    assert writer.due(IDENTITY, OTHER) == writer.due(IDENTITY, TOKENS[:119]) == []
    assert writer.waiting == snapshot(120).nbytes
    # Another text, and one that is only to be there if its request is broken off.
    assert writer.hold(snapshot(130, OTHER), 7, None, 10.0)
    assert writer.hold(snapshot(140), 7, 2)
    writer.let_go(2)
    writer.confirm(7)
    clock.now += 1
    assert writer.write_one()
    assert not writer.write_one()
    clock.now += 3
    assert not writer.write_one()
    writer.hurry(IDENTITY, TOKENS)
    assert not writer.write_one()
    writer.hurry(IDENTITY, OTHER)
    assert writer.write_one()
    assert not writer.write_one()
    assert writer.waiting == 0
    assert sorted(f.name.split("-")[2] for f in files(tmp_path)) == ["120", "130"]


def test_what_waits_for_one_request_makes_no_way_for_anothers(tmp_path: Path) -> None:
    """Both begin alike, and either may be broken off."""
    writer = Writer(opened(tmp_path))
    assert writer.hold(snapshot(100), 7, 1, 10.0)
    assert writer.hold(snapshot(120), 7, 2, 10.0)
    writer.confirm(7)
    writer.release(1)
    assert waiting(writer) == [100]
    assert writer.hold(snapshot(110), 7, 1, 10.0)
    writer.confirm(7)
    writer.let_go(1)
    writer.let_go(2)
    writer.release()
    assert waiting(writer) == [100, 120], "110 was of no use any more"
    assert writer.hold(snapshot(110), 7, None, 10.0)
    writer.confirm(7)
    assert writer.offer(snapshot(130), 7)
    writer.release()
    assert waiting(writer) == [100, 120, 130]


def test_what_one_that_waits_was_to_replace_goes_with_its_follower(
    tmp_path: Path,
) -> None:
    """A snapshot in the midst of a prompt goes when the prompt has ended."""
    writer = Writer(store := opened(tmp_path))
    passing = snapshot(90)
    assert store.publish(passing)
    end = dataclasses.replace(snapshot(100), instead_of=[passing.node])
    assert writer.hold(end, 7, 1, 10.0)
    writer.let_go(1)
    assert writer.offer(snapshot(130), 7)
    writer.confirm(7)
    assert writer.write_one()
    assert [f.name.split("-")[2] for f in files(tmp_path)] == ["130"]


def test_what_waits_is_written_by_the_thread(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path))
    writer.start()
    assert writer.hold(snapshot(100), 7, None, 0.05)
    writer.confirm(7)
    assert eventually(lambda: len(files(tmp_path)) == 1)
    assert writer.hold(snapshot(110), 7, None, 3600.0)
    writer.confirm(7)
    writer.release()  # the server stops
    writer.close(30)
    assert len(files(tmp_path)) == 2


def test_the_backlog_is_bounded_and_takes_one_that_is_larger(tmp_path: Path) -> None:
    writer = Writer(opened(tmp_path), backlog=100)
    first, second = drafts(TOKENS)
    assert writer.offer(first, 0)
    assert not writer.offer(second, 0)
    writer.confirm(0)
    writer.start()
    assert writer.flush(30)
    assert writer.offer(second, 0)
    writer.confirm(0)
    writer.close(30)
    assert len(files(tmp_path)) == 2


TWO_PROCESSES = program("writes_beside_others")


def test_three_processes_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "kv"), str(n)], env=env
        )
        for n in range(3)
    ]
    try:
        assert [process.wait(120) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    store = opened(tmp_path / "kv")
    assert store.nbytes == on_disk(tmp_path / "kv") <= 6 * 4096
