"""Reading one crash report: whole, cut, damaged, and in plain words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_safe.forensics import reader, recover, words
from support import reports

FUZZ = settings(max_examples=150, suppress_health_check=list(HealthCheck))
WHOLE = json.dumps(reports.sample()).encode()


# ---- one report --------------------------------------------------------------


def test_a_whole_report_is_read_whole() -> None:
    report = reader.parse(WHOLE)
    assert report.problems == []
    assert report.other == {}
    assert report.memory is not None
    assert report.memory.system_available is None  # -1 is unknown
    expected = reports.sample()
    expected["memory"]["system_available"] = None
    read = report.as_dict()
    for name in ("memory_history",):
        expected[name] = [
            dict(zip(("time_ns", "active", "ceiling"), row, strict=True))
            for row in expected[name]
        ]
    for name, value in expected.items():
        assert read[name] == value, name
    reports.every_way_to_show(report)


def test_cut_at_any_byte_every_whole_member_is_there() -> None:
    whole = reader.parse(WHOLE).as_dict()
    ends = {}
    for name in reports.sample():
        # A member is whole once the comma behind it is there.
        after = json.dumps(dict(_until(name))).encode()[:-1] + b","
        ends[name] = len(after)
    for end in range(len(WHOLE)):
        report = reader.parse(WHOLE[:end])
        assert report.problems, end
        read = report.as_dict()
        for name, needed in ends.items():
            if end >= needed:
                assert read[name] == whole[name], (end, name)
        if end % 7 == 0:
            reports.every_way_to_show(report)


def _until(last: str) -> list[tuple[str, Any]]:
    members = list(reports.sample().items())
    return members[: [name for name, _ in members].index(last) + 1]


def test_a_cut_text_is_shown_up_to_the_cut() -> None:
    end = WHOLE.index(b"line 3 in serve")
    report = reader.parse(WHOLE[:end])
    assert report.python_stacks is not None
    assert report.python_stacks.endswith('app.py", ')
    assert report.memory is not None
    assert not report.complete
    assert "cut" in report.problems[0]
    inside_escape = b'{"schema": 1, "why": "fault", "argv0": "x\\u00'
    assert reader.parse(inside_escape).argv0 == "x"


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))))
def test_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, value in flips:
        data[at] = value
    reports.every_way_to_show(reader.parse(bytes(data)))


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    reports.every_way_to_show(reader.parse(data))


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(st.data())
def test_any_type_in_any_member(data: st.DataObject) -> None:
    report = reports.sample()
    for _ in range(data.draw(st.integers(1, 4))):
        holder: Any = report
        name: Any = data.draw(st.sampled_from(sorted(report)))
        inner = report[name]
        if isinstance(inner, list) and inner and data.draw(st.booleans()):
            holder, name = inner, 0
            inner = inner[0]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            holder, name = inner, data.draw(st.sampled_from(sorted(inner)))
        holder[name] = data.draw(ANY_JSON)
    text = json.dumps(report, ensure_ascii=data.draw(st.booleans()))
    reports.every_way_to_show(reader.parse(text.encode("utf-8", "surrogatepass")))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\0" * 4096, "empty"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b'"text"', "expected a JSON object, found a str"),
        (b"\x89PNG\r\n\x1a\n", "not valid UTF-8"),
        ('{"schema": 1}'.encode("utf-16"), "not valid UTF-8"),
        (b"[" * 200_000, "nested deeper than"),
        (b'{"a":' * 200_000, "nested deeper than"),
        (b'{"schema": 2, "why": "fault"}', "schema 2 is newer than"),
        (b'{"schema": 1, "why": 7}', "why: expected a text, found a number"),
        (b'{"schema": 1, "why": "boredom"}', "why: 'boredom' is none of"),
        (b'{"why": "fault", "pid": true}', "pid: expected a whole number"),
        (b'{"why": "fault", "pid": 1e400}', ""),
        (b'{"why": "fault", "pid": NaN}', ""),
        (b'{"why": "fault", "pid": ' + b"9" * 5000 + b"}", ""),
        (b'{"why": "fault", "faults": [[], 3, {"code": "x"}]}', "faults[1]"),
        (WHOLE + b"\0" * 100, "100 zero bytes at the end"),
        (WHOLE + WHOLE, "more text after the end"),
        (WHOLE.replace(b'"complete": true', b'"epoch": 3'), "not complete"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, problem: str) -> None:
    report = reader.parse(data)
    assert any(problem in p for p in report.problems), report.problems
    reports.every_way_to_show(report)


def test_the_rest_of_a_damaged_report_is_read() -> None:
    damaged = reports.sample(memory=["none"], requests=[{"id": 5, "tokens": 3}])
    report = reader.parse(json.dumps(damaged).encode())
    assert report.memory is None
    assert report.requests[0].id is None
    assert report.requests[0].tokens == 3
    assert len(report.faults) == 1
    assert report.problems == [
        "memory: expected an object, found a list",
        "requests[0].id: expected a text, found a number",
    ]


def test_a_huge_file_is_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SIZE_MAX", 10**6)
    huge = reports.sample(python_stacks="x" * (2 << 20))
    report = reader.read(reports.write(tmp_path, huge))
    assert report.faults
    assert any("larger than 1.0 MB" in p for p in report.problems)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "none", "No such file"),
        ("nul\0", "embedded null"),
    ):
        (found,) = reader.read(path).problems
        assert "cannot be read" in found
        assert problem in found

    def denied(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may read everything
    report = reader.read(tmp_path / "x.json")
    assert report.problems == ["cannot be read: Permission denied"]


def test_a_report_cannot_steer_the_terminal() -> None:
    text = "\x1b[2J\x9b\u202egpj\r"
    report = reader.parse(json.dumps(reports.sample(exception_message=text)).encode())
    assert report.exception_message == "\ufffd[2J\ufffd\ufffdgpj\ufffd"


def test_numbers_that_json_cannot_hold_again() -> None:
    assert recover.loads("[NaN, Infinity, 1e999, 12]") == ([None, None, None, 12], [])


# ---- in words ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "the GPU failed a command buffer: out of memory (code 8)"),
        ({"code": 14}, "interactivity (code 0xe)"),
        ({"code": 99}, "not known (code 0x63)"),
        ({"why": "terminate"}, "that nothing caught ended the process: out of memory"),
        ({"why": "terminate", "code": -1}, 'std::runtime_error: a "quoted" message'),
        (
            {"why": "terminate", "code": -1, "exception_type": "N3mlx4core5ErrorE"},
            "mlx::core::Error: a",
        ),
        ({"why": "signal"}, "crashed: SIGSEGV, a bad memory access at 0x10"),
        ({"why": "stall"}, "made no progress"),
        ({"why": "died"}, "the process was killed, or the machine stopped"),
    ],
)
def test_headlines(changes: dict[str, Any], expected: str) -> None:
    report = reader.parse(json.dumps(reports.sample(**changes)).encode())
    assert expected in words.headline(report)


def test_advice_is_that_of_the_table_or_of_the_memory() -> None:
    def advice(**changes: Any) -> str:
        report = reports.sample(why="died", code=None, **changes)
        return words.advice(reader.parse(json.dumps(report).encode()))

    with_code = reader.parse(WHOLE)
    assert "iogpu.wired_limit_mb" in words.advice(with_code)
    assert advice().startswith("It was near its own limit")  # 17 of 18 GiB
    low = {"active": 1, "ceiling": 100, "system_total": 100, "system_available": 5}
    assert advice(memory=low).startswith("The machine's memory was nearly full")
    low["system_available"] = 50
    assert "memory was not nearly full" in advice(memory=low)
    low["footprint"] = 95
    assert advice(memory=low).startswith("The machine's memory was nearly full")
    assert advice(memory={"active": 5}).endswith("who ended the process.")


def test_the_process_is_not_held_against_the_limit_of_the_arrays() -> None:
    """230 MB for the arrays, an idle server of 267 MB, and the machine has room."""
    mb = 10**6
    memory = {
        "active": 115 * mb,
        "peak": 116 * mb,
        "cache": 5 * mb,
        "footprint": 267 * mb,
        "ceiling": 230 * mb,
        "system_total": 24064 * mb,
        "system_available": 22528 * mb,
    }
    report = reports.sample(why="died", code=None, memory=memory)
    read = reader.parse(json.dumps(report).encode())
    assert words.advice(read) == (
        "Look in the system's log for who ended the process: the machine's memory "
        "was not nearly full."
    )
    rows = {row[0]: row[1] for s in words.sections(read) for row in s.rows
            if s.title == "Memory"}  # fmt: skip
    assert rows == {
        "active": "115.0 MB, 50% of the ceiling",
        "peak": "116.0 MB, 50% of the ceiling",
        "cache": "5.0 MB",
        "footprint": "267.0 MB, 1% of the machine's memory",
        "ceiling": "230.0 MB",
        "system": "24.1 GB, 22.5 GB available",
    }


def a_name_that_explodes(times: int) -> str:
    """Each pair holds the one before it twice: to write it out takes gigabytes."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pairs = (f"S_IS{d}_S{d}_E" for d in digits[:times])
    return "_Z1fSt4pairIiiE" + "".join(pairs)


def test_native_frames_are_for_people() -> None:
    symbols = (
        ("_ZSt9terminatev", "std::terminate()"),
        ("_ZN3mlx4core4evalESt6vectorINS0_5arrayESaIS2_EE", "mlx::core::eval("),
        ("f", "f"),  # of C; as a type it were a float
        ("_ZNot a name", "_ZNot a name"),
        ("_Z" + "1a" * 1000, "_Z1a1a"),
        (a_name_that_explodes(30), "_Z1fSt4pairIiiES_IS0_S0_E"),
        (None, ""),
    )
    frames = [
        {"address": "0x1", "image": "/usr/lib/libx.so", "offset": "0x1", "symbol": s}
        for s, _ in symbols
    ]
    report = reader.parse(json.dumps(reports.sample(native_stack=frames)).encode())
    (rows,) = (s.rows for s in words.sections(report) if s.title == "Native stack")
    for (_, expected), row in zip(symbols, rows, strict=True):
        assert row[1].startswith(expected) and len(row[1]) <= 160
        assert row[2] == "libx.so + 0x1"


def test_what_follows_from_a_fault_stands_after_it() -> None:
    """The writer takes its time first, then the fault's; both are one millisecond."""
    later = [{"time_ns": reports.NOW_NS + 40_000, "code": 8, "source": "terminate"}]
    report = reports.sample(why="terminate", faults=later)
    read = reader.parse(json.dumps(report).encode())
    (rows,) = (s.rows for s in words.sections(read) if s.title.startswith("Time"))
    assert [row[:2] for row in rows[-2:]] == [
        ("+0.000", "fault"),
        ("+0.000", "terminate"),
    ]


def test_versions_and_settings_are_few_lines() -> None:
    hooked = [f"-[AGXG16XFamilyCommandBuffer method{i}:]" for i in range(12)]
    hooks = {"hooked": hooked, "installed": True, "mode": "observe", "signals": True,
             "verified": False}  # fmt: skip
    context = {"mlx": "0.32.4", "hooks": hooks}
    read = reader.parse(json.dumps(reports.sample(context=context)).encode())
    (rows,) = (s.rows for s in words.sections(read) if s.title == "Versions")
    assert rows == [
        ("mlx", "0.32.4"),
        ("hooks", "installed, signals"),
        ("hooks: not", "verified"),
        *(("hooks.hooked", name) for name in hooked),
        ("hooks.mode", "observe"),
    ]


def test_settings_in_settings_have_lines_of_their_own() -> None:
    """They were one line of Python's, cut in the midst."""
    kv_disk = {"off": None, "files": 6, "limit": 20_000_000_000}
    context = {"server": {"port": 8080, "kv_disk": kv_disk}}
    read = reader.parse(json.dumps(reports.sample(context=context)).encode())
    (rows,) = (s.rows for s in words.sections(read) if s.title == "Versions")
    assert rows == [
        ("server.port", "8080"),
        ("server.kv_disk.files", "6"),
        ("server.kv_disk.limit", "20000000000"),
    ]


def test_requests_without_ids_are_not_named() -> None:
    """As in a copy for others, which has none: each was a question mark."""
    report = reports.sample(requests=[{"path": "/v1/completions"}])
    read = reader.parse(json.dumps(report).encode())
    happened = words.sections(read)[0].rows
    assert "requests" not in [row[0] for row in happened]


def test_the_time_line_is_in_order_and_relative() -> None:
    sections = {s.title: s.rows for s in words.sections(reader.parse(WHOLE))}
    rows = sections["Time line (seconds before and after)"]
    assert [row[:2] for row in rows] == [
        ("-2.000", "request"),
        ("-1.000", "note"),
        ("-0.500", "buffer"),
        ("+0.000", "fault"),
        ("+0.000", "fault"),
    ]
    assert rows[0][2] == "started prompt_tokens=900"
    assert "812 0x600000 prefill: error, 250.0 ms" in rows[2][2]


def test_the_chart_shows_memory_under_its_ceiling() -> None:
    history = [[i, 9 * reports.GIB, 18 * reports.GIB] for i in range(20)]
    data = json.dumps(reports.sample(memory_history=history)).encode()
    lines = words.chart(reader.parse(data))
    assert lines[0] == "─" * 20 + " 19.3 GB"
    assert lines[1].strip() == ""
    assert lines[3] == "█" * 20  # half of six rows are full
    assert lines[5] == "█" * 20


def test_a_ceiling_that_is_far_above_does_not_flatten_the_chart() -> None:
    """It was mostly blank: on most machines the ceiling is far above a small model."""
    history = [[i * 10**9, reports.GIB, 18 * reports.GIB] for i in range(20)]
    data = json.dumps(reports.sample(memory_history=history)).encode()
    *bars, about = words.chart(reader.parse(data))
    assert bars[0] == "█" * 20 + " 1.1 GB"
    assert all(line == "█" * 20 for line in bars[1:])
    assert about.endswith("the ceiling is far above, at 19.3 GB")
