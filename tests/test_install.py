"""install, uninstall, status, and import on odd machines."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import mlx_safe
from mlx_safe import _install, _paths
from support import child
from support.programs import program


@pytest.fixture(autouse=True)
def leave_installed() -> object:
    yield
    mlx_safe.install()


def test_import_installs_and_says_what_is_active() -> None:
    done = child.run(
        """
        import json, mlx_safe
        print(json.dumps(mlx_safe.status().as_dict()))
        """
    )
    status = json.loads(done.stdout)
    assert status["installed"]
    assert status["terminate_handler"]
    assert status["mlx_version"] == _install.mlx_version()
    assert status["mode"] == (
        "intercept" if status["mlx_version"] < "0.32" else "observe"
    )
    assert status["on_terminate"] == "report"


def test_autoinstall_can_be_turned_off() -> None:
    done = child.run(
        """
        import mlx_safe
        status = mlx_safe.status()
        assert not status.installed and not status.terminate_handler
        assert status.reasons == ("not installed: call install()",)
        """,
        MLX_SAFE_AUTOINSTALL="0",
    )
    assert done.returncode == 0, done.stderr


def test_import_works_without_mlx() -> None:
    done = child.run(
        program("has_no_mlx"),
        ONLY_MLX_SAFE=_only_mlx_safe(),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "regime"), [("0.31.2", "intercept"), ("0.32.4", "observe")]
)
def test_the_regime_of_an_mlx_without_metadata(
    tmp_path: Path, version: str, regime: str
) -> None:
    """A build tree on PYTHONPATH has none, whatever else is installed; nor has an
    editable install."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f'__version__ = "{version}"\n')
    done = child.run(program("finds_mlx_in"), tmp_path, version, regime)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("failure", ["ImportError('no libmlx')", "OSError('no disk')"])
def test_import_works_with_a_broken_mlx(tmp_path: Path, failure: str) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f"raise {failure}\n")
    only = _only_mlx_safe()
    done = child.run(program("has_a_broken_mlx"), tmp_path, ONLY_MLX_SAFE=only)
    assert done.returncode == 0, done.stderr


def _only_mlx_safe() -> str:
    """A directory in which mlx_safe is the one package."""
    import tempfile

    directory = Path(tempfile.mkdtemp())
    (directory / "mlx_safe").symlink_to(Path(mlx_safe.__file__).parent)
    return str(directory)


def test_import_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = child.run(
        """
        import mlx_safe
        status = mlx_safe.status()
        assert status.report_dir is None
        assert any("no crash reports" in r for r in status.reasons), status.reasons
        """,
        MLX_SAFE_REPORT_DIR=str(blocked / "reports"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "regime"),
    [
        ("0.29.4", "intercept"),
        ("0.31.2", "intercept"),
        ("0.32.0", "observe"),
        ("0.32.0.dev20260701", "observe"),
        ("0.32.4", "observe"),
        ("1.0.0", "observe"),
        (None, "observe"),
    ],
)
def test_the_regime_follows_the_version(version: str | None, regime: str) -> None:
    assert _install._regime("auto", version) == regime


def test_the_regime_can_be_forced() -> None:
    assert mlx_safe.install(mode="intercept").mode == "intercept"
    assert mlx_safe.install(mode="observe").mode == "observe"


def test_install_and_uninstall_are_idempotent() -> None:
    for _ in range(50):
        mlx_safe.install()
        mlx_safe.install()
        assert mlx_safe.status().terminate_handler
        mlx_safe.uninstall()
        mlx_safe.uninstall()
        assert not mlx_safe.status().installed
        assert not mlx_safe.status().terminate_handler


def test_install_from_many_threads() -> None:
    def churn() -> None:
        for _ in range(50):
            mlx_safe.install()
            mlx_safe.uninstall()

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    assert not any(t.is_alive() for t in threads)
    assert mlx_safe.install().installed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode must be"),
        ({"on_terminate": "ignore"}, "on_terminate must be"),
        ({"drain_seconds": 0}, "drain_seconds must be over 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlx_safe.install(**arguments)  # type: ignore[arg-type]


def test_report_dir_is_platformdirs(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv("MLX_SAFE_REPORT_DIR")
    expected = str(platformdirs.user_state_path("mlx-safe") / "reports")
    assert _paths.report_dir() == expected
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere/else")
    assert _paths.report_dir() == "/somewhere/else/mlx-safe/reports"


def test_without_a_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container's user has none: there is to be no directory called "~"."""
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("MLX_SAFE_REPORT_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    directory, why_not = _install._report_dir()
    assert directory is None and "set MLX_SAFE_REPORT_DIR" in str(why_not)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """launchd and containers hand on what no shell has expanded."""
    monkeypatch.setenv("HOME", "/Users/jane")
    monkeypatch.setenv("MLX_SAFE_REPORT_DIR", "~/reports")
    assert _paths.report_dir() == "/Users/jane/reports"


def test_the_stub_names_what_the_extension_has() -> None:
    import re

    from mlx_safe import _core

    stub = (Path(mlx_safe.__file__).parent / "_core.pyi").read_text()
    named = set(re.findall(r"^(?:def|class) (\w+)", stub, re.M))
    has = {name for name in dir(_core) if not name.startswith("_")}
    assert named == has
