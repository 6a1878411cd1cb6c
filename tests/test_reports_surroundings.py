"""Crash reports where the program or the system around them is odd.

Nothing of it depends on the installed mlx; `make test` runs this file once.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_safe.forensics import reader, words
from support import child
from support.deaths import die, left_over, only_report, paths
from support.native import Native
from support.programs import PROGRAMS, program

# ---- the program's descriptors ------------------------------------------------


@pytest.mark.parametrize("in_child", [False, True])
def test_descriptors_that_the_program_has_closed(
    private_reports: Path, tmp_path: Path, in_child: bool
) -> None:
    """A daemon closes all it has not opened: the numbers then are its own files'."""
    code = program("dies_with_others_descriptors")
    done = child.run(code, tmp_path, *["fork"] * in_child)
    expected = 100 - signal.SIGABRT if in_child else -signal.SIGABRT
    assert done.returncode == expected, done.stderr
    held = {(tmp_path / str(i)).read_text() for i in range(20)}
    assert held == {"precious!" if in_child else "precious"}
    report = only_report(private_reports)
    assert report["why"] == "signal" and "not available" in report["python_stacks"]


def test_without_stdin_stdout_and_stderr(private_reports: Path) -> None:
    """What is printed to their numbers must not become part of our files."""
    done = die(
        """
    os.write(9, str([os.path.exists(f"/dev/fd/{fd}") for fd in range(3)]).encode())
    os.abort()
    """,
        before="os.dup2(1, 9); os.closerange(0, 3)",
        MLX_SAFE_AUTOINSTALL="0",
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert done.stdout == "[False, False, False]"
    only_report(private_reports)


# ---- names ----------------------------------------------------------------------


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    if sys.platform == "darwin":
        return  # its file systems have no such names
    script = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py"))
    script.write_text(
        "import mlx_safe\n"
        "from mlx_safe import _reports\n"
        "print(ascii(_reports.write('fault', 'caf\\udce9')))\n"
    )
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "MLX_SAFE_REPORT_DIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = directory.iterdir()
    assert done.stdout.strip() == ascii(str(path))
    report = only_report(directory)
    assert report["argv0"] == "?.py"
    assert report["exception_message"] == "caf?"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-m", "mine"], "mine"),
        (["-m", "mine.part", "-m", "x"], "mine.part"),
        (["mine/__main__.py", "-m", "x"], "__main__.py"),
        (["mine/part.py"], "part.py"),
    ],
)
def test_the_program_is_named_as_it_was_started(
    private_reports: Path, tmp_path: Path, words: list[str], name: str
) -> None:
    """`__main__.py` is what every package has that is run."""
    package = tmp_path / "mine"
    package.mkdir()
    # Installs itself while Python still looks for the module.
    (package / "__init__.py").write_text("import mlx_safe\n")
    for file in ("__main__.py", "part.py"):
        (package / file).write_text(
            "from mlx_safe import _reports\n_reports.write('fault', '')\n"
        )
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert only_report(private_reports)["argv0"] == name


def test_a_breadcrumb_with_a_name_that_is_not_utf8(private_reports: Path) -> None:
    done = child.run(
        r"""
        import mlx_safe
        from mlx_safe import _reports
        mlx_safe.breadcrumb("read caf\udce9")
        mlx_safe.breadcrumb("read caf\udce9", n=1)
        _reports.write("fault", "")
        """
    )
    assert done.returncode == 0, done.stderr
    for crumb in only_report(private_reports)["breadcrumbs"]:
        assert crumb["text"] == "read caf?"


def test_a_directory_too_long_for_the_crash_path(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["d" * 200] * 6)
    done = die(
        """
    print(mlx_safe.status().report_dir, mlx_safe.status().reasons, flush=True)
    os.abort()
    """,
        MLX_SAFE_REPORT_DIR=str(directory),
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert done.stdout.startswith("None ") and "its path is longer than" in done.stdout
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_relative_directory_stays_where_it_was(tmp_path: Path) -> None:
    done = child.run(program("goes_elsewhere"), tmp_path, MLX_SAFE_REPORT_DIR="here")
    assert done.returncode == -signal.SIGABRT, done.stderr
    only_report(tmp_path / "here")
    assert left_over(tmp_path / "here") == []


def test_links_are_not_followed(private_reports: Path, tmp_path: Path) -> None:
    """Somebody who may write to the directory must not choose what we overwrite."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    done = child.run(program("finds_links"), victim)
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "precious"


# ---- handlers -------------------------------------------------------------------


def test_a_crash_that_is_survived_for_ever_does_not_fill_the_disk(
    private_reports: Path,
) -> None:
    """A handler in Python returns to the instruction that crashes again."""
    done = child.run(program("crashes_for_ever"))
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGABRT
    found = [json.loads(p.read_bytes())["why"] for p in paths(private_reports)]
    assert found.count("signal") == 20
    assert found.count("terminate") == 1


def test_a_second_install_takes_back_what_was_taken_away(
    private_reports: Path,
) -> None:
    """faulthandler.disable() puts back what was before it, and us out."""
    done = die(
        """
    assert mlx_safe.status().signals
    faulthandler.disable()
    assert not mlx_safe.status().signals
    assert mlx_safe.install(signals=True).signals
    ctypes.string_at(0)
    """,
        before="faulthandler.enable()",
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert "Fatal Python error" not in done.stderr
    assert only_report(private_reports)["why"] == "signal"


# ---- how a process ends -----------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_that_ended_was_not_killed(private_reports: Path, method: str) -> None:
    """multiprocessing ends its forked workers without atexit."""
    # A file: what is spawned reads it again.
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "ends_its_workers.py"), method],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(private_reports.iterdir()) == []


# ---- what the report is about ---------------------------------------------------


@pytest.mark.parametrize("how", ["reads", "aborts", "terminates"])
def test_an_exception_that_cannot_be_asked(
    native: Native, private_reports: Path, how: str
) -> None:
    """what() is the program's code; all that is not its answer is in the report."""
    private_reports.mkdir()
    done = native.run("what_crashes", str(private_reports), how)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT), done
    report = only_report(private_reports)
    assert report["why"] == "terminate"
    assert "Broken" in report["exception_type"]
    assert report["exception_message"] == "not known: its what() crashed"
    assert report["breadcrumbs"][-1]["text"] == "about to die"
    assert report["native_stack"]
    assert left_over(private_reports) == []


def test_a_writer_that_hangs_does_not_keep_the_process_from_dying(
    native: Native, private_reports: Path
) -> None:
    """what() of an exception never returns; another thread crashes."""
    private_reports.mkdir()
    done = native.run("what_crashes", str(private_reports), "hangs")
    assert done.returncode == -signal.SIGSEGV, done
    report = only_report(private_reports)
    assert report["second"] is True and report["signal"]["name"] == "SIGSEGV"


def test_a_directory_that_was_taken_away(private_reports: Path) -> None:
    done = die(
        f"""
    import shutil
    shutil.rmtree({str(private_reports)!r})
    os.abort()
    """
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert only_report(private_reports)["signal"]["name"] == "SIGABRT"
    assert stat.S_IMODE(private_reports.stat().st_mode) == 0o700


def test_who_sent_the_signal(private_reports: Path) -> None:
    done = die(
        """
    if os.fork() == 0:
        os.kill(os.getppid(), signal.SIGSEGV)
        os._exit(0)
    time.sleep(200)
    """
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    report = only_report(private_reports)
    sender = report["signal"]["sent_by"]
    assert sender != report["pid"] and "address" not in report["signal"]
    headline = words.headline(reader.read(paths(private_reports)[0]))
    assert headline == f"the process crashed: SIGSEGV, sent by process {sender}"


def test_an_address_that_none_can_be(private_reports: Path) -> None:
    """x86 does not tell which: it is not to look like a null pointer."""
    done = die("    ctypes.string_at(0x4141414141414141)")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
    told = only_report(private_reports)["signal"]
    assert told.get("address") != "0x0"


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_an_abort_of_an_unknown_sender(private_reports: Path) -> None:
    """As on macOS, where abort() comes without one: no address is made of it."""
    done = die(
        """
    number = {"x86_64": 129, "aarch64": 138}[os.uname().machine]  # rt_sigqueueinfo
    info = (ctypes.c_int * 32)(signal.SIGABRT, 0, -1)
    ctypes.CDLL(None).syscall(number, os.getpid(), signal.SIGABRT, info)
    """
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    report = only_report(private_reports)
    assert report["signal"] == {"number": signal.SIGABRT, "name": "SIGABRT"}
    headline = words.headline(reader.read(paths(private_reports)[0]))
    assert headline == "the process crashed: SIGABRT, it aborted itself"


def test_a_crash_after_python(private_reports: Path) -> None:
    """C's own atexit runs later; faulthandler's memory is freed by then."""
    done = die(
        """
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(libc.abort, None, None)
    """
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    report = only_report(private_reports)
    assert report["signal"]["name"] == "SIGABRT"
    assert report["python_stacks"].startswith("not available")
