"""Every way to die, in child processes: what is left, and how the process ended.

None of it depends on the installed mlx; `make test` runs this file once. What
the simulated Metal models is in tests/metalsim/README.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.forensics import export, orphans, reader, records, words
from support import child, reports
from support.deaths import die, left_over, only_report, paths
from support.native import Native, in_python, run_on_metal
from support.programs import program

# ---- signals --------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("os.abort()", signal.SIGABRT),
        ("ctypes.string_at(0)", signal.SIGSEGV),
        ("faulthandler._stack_overflow()", signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGBUS)", signal.SIGBUS),
        ("os.kill(os.getpid(), signal.SIGILL)", signal.SIGILL),
        ("faulthandler._sigfpe()", signal.SIGFPE),
        ("os.kill(os.getpid(), signal.SIGTRAP)", signal.SIGTRAP),
        (
            "t = threading.Thread(target=ctypes.string_at, args=(0,))\n"
            "    t.start(); t.join()",
            signal.SIGSEGV,
        ),
    ],
)
def test_signal(private_reports: Path, how: str, number: int) -> None:
    done = die("    " + how)
    assert done.returncode == -number, done.stderr
    report = only_report(private_reports)
    assert report["why"] == "signal"
    assert report["signal"]["number"] == number
    assert report["signal"]["name"] == signal.Signals(number).name
    assert report["breadcrumbs"][-1]["text"] == "about to die"
    assert report["breadcrumbs"][-1]["fields"] == {"attempt": 1}
    stacks = report["python_stacks"]
    assert 'File "<string>"' in stacks
    # The process that died is found in both.
    assert f"Current thread {int(report['python_thread'], 16):#018x}" in stacks
    frame = report["native_stack"][0]
    assert frame["address"].startswith("0x") and frame["image"]
    assert report["context"]["python"] == sys.version.split()[0]
    assert report["context"]["hooks"]["signals"] is True
    assert left_over(private_reports) == []


def test_one_that_was_blocked_when_it_began(private_reports: Path) -> None:
    """By whoever started it; the kernel calls no handler of it then."""
    blocks = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"
    done = die("    ctypes.string_at(0)", before=blocks)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert only_report(private_reports)["signal"]["name"] == "SIGSEGV"


def test_one_that_waits_to_be_let_through(private_reports: Path) -> None:
    """It comes as soon as it is unblocked, which is where its report can be written."""
    sent = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT]); "
        "os.kill(os.getpid(), signal.SIGABRT)"
    )
    done = die("    pass", before=sent)
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert only_report(private_reports)["signal"]["name"] == "SIGABRT"


def test_without_signals_there_is_none(private_reports: Path) -> None:
    """The other side: and how it ends is the same."""
    done = child.run("import ctypes, mlx_safe; ctypes.string_at(0)")
    assert done.returncode == -signal.SIGSEGV
    assert paths(private_reports) == []
    (left,) = left_over(private_reports)
    assert left.startswith("run-")


@pytest.mark.parametrize("first", [True, False])
def test_faulthandler_still_speaks(private_reports: Path, first: bool) -> None:
    enable = "faulthandler.enable()"
    done = die(
        f"    {'pass' if first else enable}\n    ctypes.string_at(0)",
        before=enable if first else "",
    )
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1
    assert only_report(private_reports)["why"] == "signal"


def test_a_handler_of_the_program_may_live_on(private_reports: Path) -> None:
    done = die(
        """
    os.kill(os.getpid(), signal.SIGABRT)
    print("alive", flush=True)
    ctypes.string_at(0)
    """,
        before="signal.signal(signal.SIGABRT, lambda *_: print('mine', flush=True))",
    )
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout.split() == ["mine", "alive"]
    first, second = (json.loads(p.read_bytes()) for p in paths(private_reports))
    assert first["signal"]["name"] == "SIGABRT"
    assert second["signal"]["name"] == "SIGSEGV" and "second" not in second


def test_an_ignored_signal_is_left_alone(private_reports: Path) -> None:
    done = die(
        "    os.kill(os.getpid(), signal.SIGABRT); print('alive')",
        before="signal.signal(signal.SIGABRT, signal.SIG_IGN)",
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert paths(private_reports) == []


def test_uninstall_puts_the_handlers_back(private_reports: Path) -> None:
    done = die(
        """
    assert mlx_safe.status().signals
    mlx_safe.uninstall()
    assert not mlx_safe.status().signals
    ctypes.string_at(0)
    """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert paths(private_reports) == []
    assert left_over(private_reports) == []


# ---- terminate ------------------------------------------------------------


@pytest.mark.parametrize("signals", [True, False])
def test_terminate_leaves_one_report(private_reports: Path, signals: bool) -> None:
    """The abort that follows it is the same death."""
    done = die(
        f"""
    mlx_safe.install(signals={signals})
    testing.throw_on_foreign_thread()
    time.sleep(200)
    """
    )
    assert done.returncode == -signal.SIGABRT
    assert "terminate called after throwing" in done.stderr
    report = only_report(private_reports)
    assert report["why"] == "terminate" and report["code"] == 8
    assert report["faults"][-1]["source"] == "terminate"
    assert "_core" not in report["native_stack"][0]["image"]
    assert left_over(private_reports) == []


# ---- the simulated Metal --------------------------------------------------


def test_metal_fault_with_hooks_and_without(
    native: Native, private_reports: Path
) -> None:
    done = in_python(
        native,
        """
    mlx_safe.install(mode="intercept")
    testing.run_command_buffer()
    fail_next(8)
    try:
        testing.run_command_buffer()
    except RuntimeError:
        pass
    deadline = time.monotonic() + 200
    while not mlx_safe.status().reports_written:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    """,
    )
    assert done.returncode == 0, done.stderr
    report = only_report(private_reports)
    assert report["why"] == "fault" and report["code"] == 8
    assert "kIOGPUCommandBufferCallbackErrorOutOfMemory" in report["exception_message"]
    fine, failed = report["command_buffers"][-2:]
    assert (fine["status"], failed["status"]) == ("completed", "error")
    assert fine["label"] == failed["label"] == "mlx_safe.testing"
    assert failed["code"] == 8 and failed["number"] == fine["number"] + 1
    assert 0 < fine["gpu_start_s"] <= fine["gpu_end_s"] <= failed["gpu_end_s"]
    assert report["context"]["hooks"]["verified"] is True
    (fault,) = report["faults"]
    assert fault["buffer"] == failed["number"] and fault["queue"] == failed["queue"]
    paths(private_reports)[0].unlink()

    done = in_python(
        native,
        """
    mlx_safe.install(mode="intercept")
    _core.metal_uninstall()
    fail_next(8)
    testing.run_command_buffer()
    time.sleep(200)
    """,
    )
    assert done.returncode == -signal.SIGABRT
    report = only_report(private_reports)
    assert report["why"] == "terminate" and report["code"] == 8
    assert report["exception_type"] == "St13runtime_error"


# ---- a crash while the report is written ------------------------------------


@pytest.mark.parametrize(
    ("how", "number", "why"),
    [
        ("abort", signal.SIGABRT, "signal"),
        ("throw", signal.SIGABRT, "terminate"),
        ("segv", signal.SIGSEGV, "signal"),
    ],
)
def test_crash_inside_the_handler(
    native: Native, private_reports: Path, how: str, number: int, why: str
) -> None:
    private_reports.mkdir()
    done = native.run("report_crashes", str(private_reports), "context", how)
    assert done.returncode == -number, done
    first, second = paths(private_reports)
    text = first.read_text()
    assert '"epoch"' in text
    assert '"context"' not in text and '"complete"' not in text
    minimal = json.loads(second.read_bytes())
    assert minimal["second"] is True and minimal["complete"] is True
    assert minimal["why"] == why
    assert minimal["signal"]["name"] == "SIGSEGV"
    assert left_over(private_reports) == []


def test_a_crash_while_pythons_stacks_are_read_costs_only_them(
    native: Native, private_reports: Path
) -> None:
    """Where the thread that died has no GIL, the others run on meanwhile."""
    private_reports.mkdir()
    done = native.run("report_crashes", str(private_reports), "stacks", "segv")
    assert done.returncode == -signal.SIGSEGV, done
    report = only_report(private_reports)
    assert report["complete"] is True and report["native_stack"]
    assert "cut: a thread went on" in report["python_stacks"]


def test_a_call_through_a_null_pointer(private_reports: Path) -> None:
    """GCC's unwinder reads the instruction that crashed, and crashes there."""
    done = die("    ctypes.CFUNCTYPE(None)(0x10)()")
    assert done.returncode == -signal.SIGSEGV, done.stderr
    report = only_report(private_reports)
    assert report["native_stack"][0]["address"] == "0x10"
    assert 'File "<string>"' in report["python_stacks"]


def test_two_threads_at_once(private_reports: Path) -> None:
    done = child.run(program("crashes_in_eight_threads"))
    assert done.returncode == -signal.SIGSEGV
    assert only_report(private_reports)["why"] == "signal"


def test_exception_and_signal_at_once(private_reports: Path) -> None:
    done = die(
        """
    testing.throw_on_foreign_thread()
    ctypes.string_at(0)
    """
    )
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT)
    only_report(private_reports)


# ---- bad surroundings -------------------------------------------------------


def test_disk_full(private_reports: Path) -> None:
    done = die(
        """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    os.abort()
    """
    )
    assert done.returncode == -signal.SIGABRT
    (path,) = paths(private_reports)
    text = path.read_text()
    assert len(text) == 700
    assert '"why": "signal"' in text and '"number": 6' in text


def test_disk_full_does_not_disturb_the_living(private_reports: Path) -> None:
    done = child.run(program("reports_on_a_full_disk"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a crash report could not be written to") == 1


def test_a_full_disk_has_room_for_the_report_of_a_death(
    native: Native, private_reports: Path
) -> None:
    done = child.run(
        program("dies_on_a_full_disk"),
        LD_PRELOAD=native.full_disk,
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    report = only_report(private_reports)
    assert report["signal"]["name"] == "SIGABRT"
    assert len(report["breadcrumbs"]) == 256
    assert 'File "<string>"' in report["python_stacks"]
    assert left_over(private_reports) == []


def test_a_forked_child_has_room_of_its_own(private_reports: Path) -> None:
    """What two processes hold, neither of them can give up."""
    if sys.platform == "darwin":
        return  # it does not say what a descriptor without a name was called
    done = child.run(program("reserves_after_a_fork"))
    assert done.returncode == 0, done.stderr


def test_a_full_disk_where_others_take_the_room(
    native: Native, private_reports: Path
) -> None:
    done = die(
        "    ctypes.CDLL(None).full_disk(1)\n    os.abort()",
        LD_PRELOAD=native.full_disk,
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert [path.stat().st_size for path in paths(private_reports)] == [0]
    (path,) = orphans.adopt(private_reports)
    assert list(private_reports.iterdir()) == [path]
    report = reader.read(path)
    assert (report.why, report.unwritten, report.problems) == ("died", True, [])
    assert "crashed, and could not write its report" in words.headline(report)


@pytest.mark.parametrize("meanwhile", [True, False])
def test_directory_that_cannot_be_written(
    private_reports: Path, meanwhile: bool
) -> None:
    """A file takes its place while the process runs, or is there from the start."""
    if not meanwhile:
        private_reports.write_text("a file")
    done = child.run(program("loses_its_directory"), *["file"] * meanwhile)
    assert done.returncode == -signal.SIGABRT, done.stderr
    if not meanwhile:
        assert "no crash reports" in done.stdout


def test_no_descriptor_is_left(private_reports: Path) -> None:
    done = child.run(program("dies_without_descriptors"))
    assert done.returncode == -signal.SIGABRT
    assert only_report(private_reports)["why"] == "signal"


def test_forked_child(private_reports: Path) -> None:
    done = child.run(program("crashes_after_a_fork"))
    assert done.returncode == 0, done.stderr
    report = only_report(private_reports)
    assert report["pid"] == report["thread"] == int(done.stdout)
    assert report["requests"] == []
    assert left_over(private_reports) == []


# ---- of a process that lives on ----------------------------------------------


def test_faults_are_reported_at_a_limited_rate(private_reports: Path) -> None:
    done = child.run(program("many_faults"))
    assert done.returncode == 0, done.stderr
    report = only_report(private_reports)
    assert report["why"] == "fault" and report["code"] == 2
    assert report["faults"][0]["source"] == "injected"
    assert "_report_fault" in report["python_stacks"]
    *others, own = report["python_stacks"].split("\n\n")
    assert len(others) == 1 and "'MainThread'" in others[0]
    assert 'File "<string>"' in others[0]
    ident = f"{int(report['python_thread'], 16):#018x}"
    who = f"The thread that reports, {report['thread']} 'mlx-safe-faults', {ident} ("
    assert own.startswith(who) and "_report_fault" in own


def test_run_file(private_reports: Path) -> None:
    done = child.run(program("is_killed_with_a_request"))
    assert done.returncode == -signal.SIGKILL
    (path,) = private_reports.iterdir()
    left = json.loads(path.read_bytes())
    assert path.name == f"run-{left['pid']}.json"
    assert left["why"] == "running" and left["complete"] is True
    memory = left["memory"]
    assert [memory[n] for n in ("active", "peak", "cache")] == [2, 2, 3]
    assert memory["ceiling"] == 5
    assert left["memory_history"][0][1:] == [2, 5]
    (request,) = left["requests"]
    assert request.pop("age_ms") >= 0
    assert request == {
        "id": "cmpl-1",
        "path": "/v1/completions",
        "prompt_tokens": 100,
        "prefilled": 64,
        "tokens": 3,
    }
    path.unlink()
    for ends in ("pass", "raise SystemExit(3)", "raise KeyError", "1/0"):
        child.run(f"import mlx_safe\n{ends}")
        assert list(private_reports.iterdir()) == []


# ---- the memory of a process that has nothing but the library -----------------


@pytest.mark.parametrize(
    "how",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.abort()",
        "testing.throw_on_foreign_thread(); time.sleep(60)",
        "_reports.write('fault', 'one')",
    ],
    ids=["killed", "signal", "terminate", "fault"],
)
@pytest.mark.parametrize("block", ["with mlx_safe.guard(): pass", "mlx_safe.check(0)"])
def test_memory_in_a_library_process(
    private_reports: Path, how: str, block: str
) -> None:
    done = die(
        f"""
    import mlx.core as mx
    from mlx_safe import _reports
    held = mx.ones((1 << 20,)); mx.eval(held)
    {block}
    {how}
    """
    )
    assert done.returncode in (0, -signal.SIGKILL, -signal.SIGABRT), done.stderr
    (path,) = private_reports.iterdir()  # a report, or a run file
    memory = json.loads(path.read_bytes())["memory"]
    assert 1 << 22 <= memory["active"] <= memory["peak"]
    assert 10 << 20 < memory["footprint"] < memory["system_total"]
    assert 0 < memory["system_available"] <= memory["system_total"]
    assert memory["ceiling"] == -1  # that is the server's


def test_memory_before_mlx_is_imported(private_reports: Path) -> None:
    done = die("    os.abort()")
    assert done.returncode == -signal.SIGABRT, done.stderr
    memory = only_report(private_reports)["memory"]
    assert memory["active"] == -1 and memory["footprint"] > 0


def test_the_thread_of_the_callbacks_keeps_the_run_file_fresh(
    private_reports: Path,
) -> None:
    """Where Metal is hooked there is such a thread, and no guard is needed."""
    done = child.run(program("run_file_without_guards"))
    assert done.returncode == 0, done.stderr
    assert list(private_reports.iterdir()) == []


def test_a_death_while_the_run_file_is_written_leaves_nothing_of_it(
    private_reports: Path,
) -> None:
    for _ in range(5):
        done = child.run(program("dies_while_it_writes"))
        assert done.returncode == -signal.SIGABRT, done.stderr
        left = left_over(private_reports)
        assert [name for name in left if "run-" in name] == []


def test_no_run_file_after_the_end_or_in_a_forked_child(private_reports: Path) -> None:
    """Threads may leave guards until the very end; a child may do so, too."""
    done = child.run(program("ends_after_a_fork"))
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr


# ---- breadcrumbs ----------------------------------------------------------


def test_breadcrumbs_take_anything(private_reports: Path) -> None:
    done = child.run(program("odd_breadcrumbs"))
    assert done.returncode == 0, done.stderr
    a, b, c, d, e = only_report(private_reports)["breadcrumbs"]
    assert a["text"] == "x" * 94
    assert b["fields"] == {
        "n": None,
        "t": True,
        "i": -3,
        "f": 0.5,
        "s": '"\n',
        "odd": "__main__.Odd",
    }
    assert c["fields"]["nan"] is None and c["fields"]["lone"] is None
    assert d["fields"] == {"kept": 1, "also": 2}
    assert e["fields"] == {'a "key"': 1, "text": 2, "kind": 3}


def test_breadcrumbs_of_many_threads(private_reports: Path) -> None:
    done = child.run(program("breadcrumbs_of_threads"))
    assert done.returncode == 0, done.stderr
    crumbs = only_report(private_reports)["breadcrumbs"]
    assert len(crumbs) == 256
    by_thread: dict[str, list[int]] = {}
    for crumb in crumbs:
        by_thread.setdefault(crumb["text"], []).append(crumb["fields"]["i"])
    assert all(seen == sorted(seen) for seen in by_thread.values())


# ---- the schema ---------------------------------------------------------------


@pytest.fixture(scope="module")
def every_kind(
    native: Native, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Reports of every way to be written, with all there is to tell."""

    def report_crashes(MLX_SAFE_REPORT_DIR: str) -> None:
        native.run("report_crashes", MLX_SAFE_REPORT_DIR, "context", "abort")

    def found(
        run: Callable[..., Any], *arguments: Any, cut: int = 0, **environment: str
    ) -> None:
        directory = tmp_path_factory.mktemp("kind")
        run(*arguments, **environment, MLX_SAFE_REPORT_DIR=str(directory))
        orphans.adopt(directory)
        whole = paths(directory)[cut:]
        collected.extend(json.loads(path.read_bytes()) for path in whole)

    collected: list[dict[str, Any]] = []
    found(run_on_metal, native, "report_of_each_kind")
    found(die, "    ctypes.string_at(0)")
    found(die, "    os.kill(os.getpid(), signal.SIGKILL)")
    found(die, "    os.kill(os.getpid(), signal.SIGBUS)")
    found(report_crashes, cut=1)
    found(
        die,
        "    ctypes.CDLL(None).full_disk(1); os.abort()",
        LD_PRELOAD=native.full_disk,
    )
    return collected


def test_what_is_written_is_what_the_schema_says(
    every_kind: list[dict[str, Any]],
) -> None:
    table = reports.documented()
    order = list(table)
    seen = set()
    for report in every_kind:
        for name, value in reports.members_of(report):
            assert name in table, (report["why"], name)
            assert type(value) is reports.TYPES[table[name]], (name, value)
            seen.add(name)
        places = [order.index(name) for name in report]
        assert places == sorted(places), list(report)
        assert report["started_ns"] <= report["time_ns"]
        memory = report.get("memory", {})
        assert memory.get("peak", -1) >= memory.get("active", -1)
        assert all(len(point) == 3 for point in report.get("memory_history", ()))
        for name, value in reports.members_of(export.exported(records.decode(report))):
            if name != "left_out":
                assert type(value) is reports.TYPES[table[name]], (name, value)
    assert {report["why"] for report in every_kind} == set(records.WHY) - {"running"}
    # The reader adds the name; a server tells of itself in the context.
    own = {name for name in table if name.startswith("context.server")}
    assert table.keys() - seen - own == {"name"}


def test_the_hooks_are_told_as_they_were_set_up(
    every_kind: list[dict[str, Any]],
) -> None:
    """What counts would be that of the install, beside a fault that it denies."""
    fault = next(report for report in every_kind if report["why"] == "fault")
    assert fault["epoch"] == 1
    assert fault["context"]["hooks"].keys() == {
        "hooked", "installed", "metal_hooks", "mode", "on_terminate", "report_dir",
        "runtime", "signals", "terminate_handler", "verified",
    }  # fmt: skip
    assert words.sections(records.decode(fault))


# ---- what the crash path may call -------------------------------------------

# async-signal-safe by POSIX (signal-safety(7)), or without any state.
SAFE = {
    "_exit", "abort", "clock_gettime", "close", "dup2", "fcntl", "fstat", "ftruncate",
    "getpid", "lseek", "memcpy", "memmove", "memset", "mkdir", "nanosleep", "open",
    "pipe", "pthread_self", "raise", "read", "strnlen", "rename", "sigaction",
    "sigaltstack", "sigemptyset", "siglongjmp", "sigsetjmp", "strchr", "strlen",
    "syscall", "unlink",
    "write", "pthread_threadid_np",
}  # fmt: skip
# Not on that list, each with what makes it bearable.
BEARABLE = {
    # after `prime_native_stack`, inside `run_guarded`
    "_Unwind_Backtrace", "_Unwind_GetIP", "dladdr",
    # the exception that is on its way already: nothing is allocated
    "__cxa_begin_catch", "__cxa_current_exception_type", "__cxa_end_catch",
    "__cxa_rethrow", "_ZTIPKc", "_ZTISt9exception", "_ZTVSt9exception",
    # install only
    "_ZSt13get_terminatev", "_ZSt13set_terminatePFvvE",
    # data, or the compiler's own
    "__errno_location", "__error", "__gxx_personality_v0", "__stack_chk_fail",
    "__stack_chk_guard", "_GLOBAL_OFFSET_TABLE_", "_Unwind_Resume",
    "_ZSt9terminatev", "__clang_call_terminate",
}  # fmt: skip
# The folder is the list: what is called while the process dies lies in it.
CRASH_PATH = sorted((Path(__file__).parents[1] / "src/cpp/crash").glob("*.cpp"))


def objects_of(native: Native, unit: str) -> Path:
    built = native.directory / "mlx_safe/CMakeFiles/mlx_safe_native.dir/src/cpp"
    return built / f"{unit}.cpp.o"


def undefined(path: Path) -> set[str]:
    out = subprocess.run(
        ["nm", "-u", str(path)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    names = {line.split()[-1] for line in out.splitlines() if line.strip()}
    if sys.platform == "darwin":
        names = {name.removeprefix("_") for name in names}
    # What a hardened C library calls them.
    return {name.removeprefix("__").removesuffix("_chk") if name.endswith("_chk")
            else {"__sigsetjmp": "sigsetjmp", "open64": "open",
                  "ftruncate64": "ftruncate", "lseek64": "lseek",
                  "fcntl64": "fcntl", "fstat64": "fstat"}.get(name, name)
            for name in names}  # fmt: skip


def test_the_crash_path_calls_nothing_unsafe(native: Native) -> None:
    for source in CRASH_PATH:
        path = objects_of(native, f"crash/{source.stem}")
        called = {s for s in undefined(path) if "8mlx_safe" not in s}
        assert called <= SAFE | BEARABLE, (source.name, called - SAFE - BEARABLE)
    # The test sees what it is to forbid.
    assert any("Znw" in s for s in undefined(objects_of(native, "metal/ledger")))


def test_ours_calls_only_ours_in_the_crash_path(native: Native) -> None:
    """What those call in our code is in those files, too."""
    defined: set[str] = set()
    called: set[str] = set()
    for source in CRASH_PATH:
        path = objects_of(native, f"crash/{source.stem}")
        out = subprocess.run(
            ["nm", str(path)], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for line in out.splitlines():
            *_, kind, symbol = line.split()
            (called if kind == "U" else defined).add(symbol)
    assert {s for s in called - defined if "8mlx_safe" in s} == set()


def test_reports_are_off_where_asked(tmp_path: Path) -> None:
    environment = {**os.environ, "MLX_SAFE_AUTOINSTALL": "0"}
    done = subprocess.run(
        [sys.executable, "-c", "import mlx_safe; mlx_safe.breadcrumb('x')"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "reports").exists()
