"""What the doctor holds against each other."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_safe import checks
from mlx_safe.checks import BAD
from support import child


def library(oldest: tuple[int, int]) -> bytes:
    """The head of a Mach-O library: one other command, then LC_BUILD_VERSION."""
    header = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 6, 2, 0, 0, 0)
    other = struct.pack("<4I", 0x1B, 16, 1, 2)
    version = oldest[0] << 16 | oldest[1] << 8
    return header + other + struct.pack("<6I", 0x32, 24, 1, version, 0x1A0500, 0)


def metallib(oldest: tuple[int, int]) -> bytes:
    """The head of MLX's own, of the wheels of 0.32.4."""
    head = bytes.fromhex("4d544c4201800200090000811a00020000a0c4c30c00000000")
    return head[:12] + struct.pack("<HH", *oldest) + head[16:]


def folder(path: Path, oldest: tuple[int, int], kernels: tuple[int, int]) -> Path:
    (path / "libmlx.dylib").write_bytes(library(oldest))
    (path / "mlx.metallib").write_bytes(metallib(kernels))
    return path


@pytest.mark.parametrize(
    ("built", "macos", "bad"),
    [
        ((26, 2), "26.0", True),
        ((26, 2), "26.1.1", True),
        ((26, 2), "26.2", False),
        ((26, 2), "26.10", False),
        ((26, 2), "27", False),
        ((15, 0), "26.0", False),
        ((15, 0), "14.7", True),
        ((14, 0), "14.0", False),
    ],
)
def test_the_macos_that_mlx_is_for(
    tmp_path: Path, built: tuple[int, int], macos: str, bad: bool
) -> None:
    found = checks.built_for(folder(tmp_path, built, built))
    assert found == {"libmlx.dylib": built, "mlx.metallib": built}
    (line,) = checks.macos_check(found, macos, "0.32.4")
    assert line.startswith(BAD) is bad
    if bad:
        older = "macosx_15_0_arm64" if macos.startswith("26") else "macosx_14_0_arm64"
        assert f"mlx_metal-0.32.4-py3-none-{older}.whl" in line


def test_kernels_that_are_newer_than_the_library(tmp_path: Path) -> None:
    found = checks.built_for(folder(tmp_path, (15, 0), (26, 2)))
    (line,) = checks.macos_check(found, "26.1", "0.32.4")
    assert line.startswith(BAD) and "mlx.metallib for macOS 26.2" in line


def test_files_that_are_none(tmp_path: Path) -> None:
    assert checks.built_for(tmp_path) == {}
    for name in ("libmlx.dylib", "mlx.metallib"):
        for data in (b"", b"\x7fELF" + bytes(60), library((1, 0))[:40], b"MTLB"):
            (tmp_path / name).write_bytes(data)
            assert checks.built_for(tmp_path) == {}
    assert checks.macos_check({}, "26.0", "0.32.4") == []


@pytest.mark.parametrize(
    ("driver", "package", "bad"),
    [
        ("580.65.06", "mlx-cuda-13", False),
        ("575.57.08", "mlx-cuda-13", True),
        ("575.57.08", "mlx-cuda-12", False),
        ("470.1", "mlx-cuda-12", True),
        (None, "mlx-cuda-12", True),
        ("580.65.06", None, False),
    ],
)
def test_the_driver_of_a_card(
    driver: str | None, package: str | None, bad: bool
) -> None:
    (line,) = checks.driver_check(driver, package)
    assert line.startswith(BAD) is bad


@pytest.mark.parametrize("package", ["mlx-cuda-12", "mlx-cuda-13"])
def test_the_backend_of_a_card_is_found(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked for as a package to import: on a card the doctor said CPU."""
    about = tmp_path / f"{package.replace('-', '_')}-0.32.4.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {package}\nVersion: 0.32.4\n")
    assert checks.cuda_package() is None
    monkeypatch.syspath_prepend(tmp_path)
    assert checks.cuda_package() == package


NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("package", "error", "shown", "reason"),
    [
        (
            "mlx-cuda-13",
            f"raise ImportError({NO_DRIVER!r})",
            "CUDA (mlx-cuda-13), ",
            "this machine has no NVIDIA driver (libcuda.so.1)",
        ),
        (None, "raise ImportError('libopenblas')", "CPU", "(libopenblas)"),
        (None, "", "CPU", None),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_status_names_the_backend_and_what_it_lacks(
    tmp_path: Path,
    package: str | None,
    error: str,
    shown: str,
    reason: str | None,
    form: str,
) -> None:
    """Of an MLX for a card without a driver it said that there is no Metal."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(error)
    for name in filter(None, ("mlx", package)):
        about = tmp_path / f"{name.replace('-', '_')}-0.32.4.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {name}\nVersion: 0.32.4\n")
    done = child.run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mlx_safe.cli import main
        sys.exit(main(["status", *{["--json"] * (form == "json")!r}]))
        """,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if form == "json":
        found = json.loads(done.stdout)
        backend, first = found["backend"], (found["reasons"] or [""])[0]
    else:
        lines = dict(
            x.split(maxsplit=1) for x in done.stdout.splitlines() if x[0] != " "
        )
        backend, first = lines["backend"], lines["reasons"]
    if sys.platform == "darwin" and package is None:
        shown = "Metal"
    assert backend.startswith(shown)
    assert reason is None or reason in first


def test_no_card_is_no_line() -> None:
    assert checks.driver_check(None, None) == []


def test_the_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"one": tmp_path / "not" / "there", "two": tmp_path}
    (line,) = checks.disk_check(places)  # they are on one volume
    assert line.endswith(" free for one and two")
    monkeypatch.setattr(checks, "FREE_MIN", 10**18)
    (line,) = checks.disk_check(places)
    assert line.startswith(BAD)


def test_a_place_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """The doctor ended with a traceback."""
    (line,) = checks.disk_check({"one": tmp_path / ("x" * 300) / "reports"})
    assert line.endswith(" free for one")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (
            "/opt/venv/bin/python3.11 -u /opt/venv/bin/mlx-safe serve -x",
            "mlx-safe serve",
        ),
        ("python -m mlx_safe serve --model m", "mlx_safe serve"),
        ("python3 -m mlx_lm.server --port 1", "mlx_lm.server"),
        ("/x/Python.app/Contents/MacOS/Python /x/bin/mlx_lm.server", "mlx_lm.server"),
        ("mlx_lm server", "mlx_lm server"),
        ("/usr/local/bin/ollama serve", "ollama"),
        ("/Applications/LM Studio.app/Contents/MacOS/LM Studio", "LM Studio.app"),
        # They name one, and are none.
        ("vim mlx_lm.server.md", None),
        ("tail -f /var/log/vllm-mlx", None),
        ("pip install mlx-openai-server", None),
        ("python -c pass mlx_lm.server", None),
        ("/bin/sh -c exec mlx-safe serve", None),
        ("mlx-safe reports", None),
        ("mlx_lm.server.old", None),
        ("", None),
    ],
)
def test_what_is_a_server(command: str, name: str | None) -> None:
    """The doctor warned of an editor with a file of that name."""
    assert checks.server_of(command) == name


def test_another_server_is_seen_and_its_key_is_not(
    private_reports: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # It looks like one in the list of processes, and computes nothing.
    script = tmp_path / "mlx_lm.server"
    script.write_text("import sys; print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, str(script), "--api-key", "s3cret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        monkeypatch.setattr(checks, "NAMED_MAX", 1000)
        (line,) = checks.others_check(os.getpid())
        other.stdin.close()
    assert line.startswith(BAD)
    assert f"mlx_lm.server (pid {other.pid})" in line
    assert "GPU" not in line  # there may be none here
    assert "s3cret" not in line
    assert f"(pid {os.getpid()})" not in line


def defaults(file: Path | None, variables: dict[str, str] | None = None) -> list[str]:
    words = [] if file is None else ["--config", str(file)]
    return checks.ServerFlags.read(words, variables or {}).lines()


def test_defaults_that_no_server_would_take(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("temp = -3")
    (line,) = defaults(file)
    assert line == (
        f"{BAD}mlx-safe serve would not start: --temp -3.0: must be at least 0.0 "
        f"(--temp comes from {file})"
    )
    (line,) = defaults(None, {"MLX_SAFE_TOP_P": "7"})
    assert line.startswith(f"{BAD}mlx-safe serve would not start: --top-p 7.0: must be")
    file.write_text("temp = 0.5")
    assert defaults(file) == [f"{file} sets temp"]
    variables = {"MLX_SAFE_CONFIG": str(file), "MLX_SAFE_TOP_P": "0.5"}
    assert defaults(None, variables) == [
        f"{file} sets temp",
        "the environment sets top-p",
    ]
    file.write_text("")
    assert defaults(file) == [f"{file} sets nothing"]
    assert defaults(None) == []


def test_the_doctor_in_a_terminal_of_few_characters(tmp_path: Path) -> None:
    file = tmp_path / "é.toml"
    file.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_safe", "doctor", "--config", str(file)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "?.toml sets nothing" in done.stdout


def test_the_doctor_says_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("min-p = 2")
    done = child.run(
        f"""
        import sys
        from mlx_safe.cli import main
        sys.exit(main(["doctor", "--config", {str(file)!r}]))
        """
    )
    assert done.returncode == 0, done.stderr
    assert "\ndisk        " in done.stdout
    assert "\ndefaults    ! mlx-safe serve would not start: --min-p 2.0" in done.stdout
