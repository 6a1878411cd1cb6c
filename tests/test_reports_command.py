"""`mlx-safe reports`: list, show, export, prune; and its documentation."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_safe import cli
from mlx_safe.forensics import export, reader, records, store
from support import reports

DOCS = Path(__file__).parent.parent / "docs" / "reports.md"
WHOLE = json.dumps(reports.sample()).encode()

# ---- the command -----------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["reports", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_list(private_reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no reports in" in run(capsys)
    assert json.loads(run(capsys, "--json")) == []
    reports.write(private_reports, reports.sample(), "1-4242.json")
    reports.write(private_reports, WHOLE[:90], "2-17.json")
    lines = run(capsys, "list").splitlines()
    assert "fault" in lines[2]
    assert "4242" in lines[2]
    assert "new" in lines[2]
    assert "2-17" in lines[3]
    assert run(capsys, "--json", "list") == run(capsys, "list", "--json")
    first, second = json.loads(run(capsys, "--json"))
    assert (first["id"], first["why"], first["pid"]) == ("1-4242", "fault", 4242)
    assert first["new"]
    assert first["problems"] == []
    assert "cut" in second["problems"][0]


def test_list_says_whose_it_is(
    private_reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two servers may have one directory."""
    context = {**reports.sample()["context"], "server": {"port": "81", "model": "m"}}
    reports.write(private_reports, reports.sample(context=context), "1-4242.json")
    assert run(capsys, "list").splitlines()[2].endswith(" (on port 81 with m)")
    (told,) = json.loads(run(capsys, "--json"))
    assert told["server"] == "on port 81 with m"


def test_show_and_seen(
    private_reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = reports.write(private_reports, reports.sample())
    shown = run(capsys, "show")
    for text in (
        "out of memory (code 8)",
        "iogpu.wired_limit_mb",
        "std::runtime_error",
        "1 h 2 min 5 s",
        "18.3 GB, 94%",
        "chatcmpl-1",
        "started prompt_tokens=900",
        "check_error",
        "libmlx.dylib + 0x10",
        "line 3 in serve",
        "hooks.mode",
        "█",
    ):
        assert text in shown, text
    assert not json.loads(run(capsys, "--json"))[0]["new"]
    for which in (path.stem, path.name, str(path), "latest"):
        assert run(capsys, "show", which) == shown
    told = json.loads(run(capsys, "show", "--json"))
    assert told["headline"].startswith("the GPU failed")
    assert told["memory"]["active"] == 17 * reports.GIB


@pytest.mark.parametrize("verb", ["show", "export"])
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("12-34", "no report '12-34' in"),
        ("no/such.json", "no such file: no/such.json"),
        ("\0/", "no such file"),
        ("", "no report ''"),
        ("latest", "no reports in"),
    ],
)
def test_mistakes(
    verb: str, which: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reports", verb, which]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlx-safe: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["show", "export"])
def test_a_path_that_is_no_file(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reports", verb, str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"mlx-safe: {tmp_path}: cannot be read: not a file\n")


@pytest.mark.parametrize("verb", [[], ["list"], ["show"], ["prune"]])
def test_a_directory_that_does_not_exist(
    private_reports: Path, verb: list[str]
) -> None:
    """Its name may be mistyped: it is told, and not made."""
    command = [sys.executable, "-m", "mlx_safe", "reports", *verb]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert not private_reports.exists(), said
    if verb != ["prune"]:
        assert f"{private_reports}: it does not exist (MLX_SAFE_REPORT_DIR)" in said


def test_prune_counts_what_goes(private_reports: Path) -> None:
    for second in range(3):
        reports.write(private_reports, WHOLE, name=f"{1700000000 + second}-42.json")
    command = [sys.executable, "-m", "mlx_safe", "reports", "prune"]
    env = os.environ | {"MLX_SAFE_REPORTS_KEEP": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("removed 2 reports")


@pytest.mark.parametrize(
    "arguments", [["sing"], ["show", "a", "b"], ["--jsn"], ["export"], ["prune", "-x"]]
)
def test_mistaken_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reports", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize("arguments", [["list"], ["show"], ["export", "latest"]])
def test_nowhere_to_write_to(private_reports: Path, arguments: list[str]) -> None:
    reports.write(private_reports, WHOLE)
    command = [sys.executable, "-m", "mlx_safe", "reports", *arguments]
    to_stdout = ["-o", "-"] if "export" in arguments else []
    redirections = {">&-": "there is no stdout", ">/dev/full": "stdout: No space"}
    if not Path("/dev/full").exists():
        del redirections[">/dev/full"]
    for redirected, said in redirections.items():
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirected}', "sh", *command, *to_stdout],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 2, done
        assert done.stderr.startswith(f"mlx-safe: {said}"), done
        assert done.stderr.count("\n") == 1, done


def test_half_an_export_is_taken_away(
    private_reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.write(private_reports, reports.sample(python_stacks="x" * 100_000))
    target = tmp_path / "copy.json"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status = cli.main(["reports", "export", "latest", "-o", str(target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert capsys.readouterr().err == f"mlx-safe: {target}: File too large\n"
    assert not target.exists()


def test_odd_files_in_every_command(
    private_reports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = (b"", b"\0\0", b"[" * 100_000, b"\xff\xfe", WHOLE[:50], b"[]", b"{}")
    for i, data in enumerate(odd):
        reports.write(private_reports, data, f"{i}-1.json")
    (private_reports / "90-1.json").mkdir()
    (private_reports / "91-1.json").symlink_to(tmp_path / "nowhere")
    assert len(json.loads(run(capsys, "--json"))) == len(odd) + 2
    run(capsys)
    for entry in store.entries(private_reports):
        run(capsys, "show", entry.id)
        run(capsys, "show", entry.id, "--json")
        status = cli.main(["reports", "export", entry.id, "-o", "-"])
        err = capsys.readouterr().err
        assert (status, err == "") in ((0, True), (2, False))
        assert err.count("\n") <= 1
    monkeypatch.setenv("MLX_SAFE_REPORTS_KEEP", "3")
    assert "removed 6 reports" in run(capsys, "prune")


def test_a_directory_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_SAFE_REPORT_DIR", str(tmp_path / "file"))
    assert cli.main(["reports"]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_no_text_of_a_report_looks_like_a_row(
    private_reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "x\n  what  all is well\u2028\t"
    request = {"id": line, "path": line}
    frame = {"address": line, "image": line, "offset": line, "symbol": line}
    hostile = reports.sample(
        why=line,
        argv0=line,
        python_thread=line,
        exception_type=line,
        exception_message=line,
        policy=line,
        signal={"number": 11, "name": line, "address": line},
        context={"mlx": line, line: line, "hooks": {line: line}},
        requests=[request],
        native_stack=[frame],
    )
    reports.write(private_reports, hostile)
    for arguments in ((), ("show",)):
        printed = run(capsys, *arguments)
        assert "all is well" in printed
        assert not any(row.startswith("  what  all") for row in printed.splitlines())


def test_with_rich_and_without_the_same_is_said(
    private_reports: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports.write(private_reports, reports.sample(argv0="[red]bold[/red]"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    coloured = run(capsys, "show")
    assert "\x1b[1mWhat happened" in coloured
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    plain = run(capsys, "show")
    assert "\x1b" not in plain
    assert "[red]bold[/red]" in plain
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert bare.split() == plain.split()


def test_a_terminal_that_knows_ascii_only(private_reports: Path) -> None:
    reports.write(private_reports, reports.sample())
    done = subprocess.run(
        [sys.executable, "-m", "mlx_safe", "reports", "show"],
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"out of memory (code 8)" in done.stdout


# ---- the copy for a bug report -----------------------------------------------------


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, "export", *arguments, "-o", "-"))
    return found


def test_export_leaves_out_what_is_private(
    private_reports: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/srv/people/jdoe")
    monkeypatch.setenv("LOGNAME", "jdoe")
    monkeypatch.setattr("platform.node", lambda: "janes-mac.example.org")
    report = reports.sample(
        exception_message="jdoe@janes-mac: /srv/people/jdoe/x, /srv/people/jdoes/y",
        environment={"TOKEN": "hunter2"},
    )
    report["breadcrumbs"][0]["fields"]["id"] = "chatcmpl-1"
    report["context"]["argv"] = ["serve", "--api-key", "hunter2"]
    report["context"]["host"] = "janes-mac.example.org"
    reports.write(private_reports, report)
    copy = exported(capsys, "latest")
    text = json.dumps(copy)
    for private in ("hunter2", "jane", "jdoe@", "janes-mac", "chatcmpl", "ACME"):
        assert private not in text, private
    assert copy["exception_message"] == "<user>@<host>: ~/x, /srv/people/jdoes/y"
    assert copy["native_stack"][0]["image"] == "~/venv/libmlx.dylib"
    assert "~/app.py" in copy["python_stacks"]
    assert copy["breadcrumbs"][0]["fields"] == {"prompt_tokens": 900}
    assert "argv0" not in copy
    assert copy["requests"][0]["prompt_tokens"] == 900
    told = "; ".join(copy["left_out"])
    for what in ("argv0", "context", "not known: 1", "ids", "--with-fields", "home"):
        assert what in told, what
    assert "ACME" in json.dumps(exported(capsys, "latest", "--with-fields"))


def test_export_without_a_home_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a container the user may be a number that has no entry."""
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    text = json.dumps(export.exported(reader.parse(WHOLE)))
    assert "jane" not in text


def test_export_writes_one_private_file_that_can_be_read_again(
    private_reports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = reports.write(private_reports, reports.sample())
    monkeypatch.chdir(tmp_path)
    out = run(capsys, "export", path.stem)
    copy = tmp_path / f"mlx-safe-report-{path.stem}.json"
    assert f"written: {copy.name}" in out
    assert "left out: the name of the program (argv0);" in out
    assert copy.stat().st_mode & 0o777 == 0o600
    assert reader.read(copy).problems == []
    assert "out of memory (code 8)" in run(capsys, "show", copy.name)
    assert cli.main(["reports", "export", path.stem]) == 2
    assert "exists; choose another with -o FILE" in capsys.readouterr().err
    assert cli.main(["reports", "export", path.stem, "-o", "no/such/dir/x"]) == 2
    assert "no/such/dir/x: No such file" in capsys.readouterr().err


# ---- the documentation ---------------------------------------------------------------


def test_the_example_reports_are_read_without_a_problem() -> None:
    examples = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        report = reader.parse(example.encode())
        assert report.problems == []
        assert report.other == {}
        reports.every_way_to_show(report)


def test_every_member_is_documented() -> None:
    named = reports.documented().keys()
    expected = set()
    inner = {
        "signal": records.Signal,
        "memory": records.Memory,
        "requests[]": records.RequestEntry,
        "breadcrumbs[]": records.Breadcrumb,
        "command_buffers[]": records.CommandBuffer,
        "faults[]": records.FaultEntry,
        "native_stack[]": records.Frame,
    }
    members = reader.parse(b"{}").as_dict()
    for name in members.keys() - {"problems", "other"}:
        expected.add(name)
    for where, cls in inner.items():
        expected |= {f"{where}.{field.name}" for field in dataclasses.fields(cls)}
    # The context is whatever a program tells of itself.
    assert {name for name in named if not name.startswith("context.")} == expected
