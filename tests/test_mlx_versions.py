"""What is known of MLX's versions is one table, and everybody says the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import mlx_safe
from mlx_safe import _mlx_versions, doctor
from mlx_safe._mlx_versions import (
    VERSIONS,
    behaviour_of,
    notes_of,
    parse_version,
)
from mlx_safe.server.mlx_lm import requirements
from support import child
from support.versions import (
    EXECUTED,
    MIXED_PAIR,
    NEWEST_PAIR,
    OLDEST_PAIR,
    READ,
    TOO_NEW_MLX_LM,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "metal.md"
PYPROJECT = ROOT / "pyproject.toml"


@pytest.mark.parametrize(
    ("version", "raises", "can_hang"),
    [
        ("0.30.6", "handler", False),
        ("0.31.2", "handler", False),
        ("0.32.0", "nothing", False),
        ("0.32.0.dev20260701", "nothing", False),
        ("0.32.1", "wait", True),
        ("0.32.2", "wait", True),
        ("0.32.3", "wait", True),
        ("0.32.4", "wait", False),
        ("1.0", "wait", False),
        (None, "wait", False),
    ],
)
def test_the_row_of_a_version(version: str | None, raises: str, can_hang: bool) -> None:
    row = behaviour_of(version)
    assert (row.raises, row.can_hang) == (raises, can_hang)
    assert row.regime == ("intercept" if raises == "handler" else "observe")


def test_rows_are_in_order() -> None:
    assert all(a.since < b.since for a, b in itertools.pairwise(VERSIONS))
    assert VERSIONS[-1].since <= _mlx_versions.NEWEST


def test_what_is_shipped_names_the_tested_versions() -> None:
    """requirements/versions.mk is the one list; these cannot read it."""
    (oldest_mlx, oldest), (newest_mlx, newest) = OLDEST_PAIR, NEWEST_PAIR
    assert parse_version(newest_mlx) == _mlx_versions.NEWEST
    assert f"newer than {newest_mlx}," in _mlx_versions._UNKNOWN
    bound = f"mlx-lm>={oldest},<{TOO_NEW_MLX_LM}"
    assert bound == requirements.REQUIREMENT
    too_new = parse_version(TOO_NEW_MLX_LM)
    assert (parse_version(oldest), too_new) == requirements.SUPPORTED
    assert parse_version(oldest) <= parse_version(newest) < too_new
    project = PYPROJECT.read_text()
    assert f'"{bound}"' in project
    for package in ("mlx", "mlx[cpu]", "mlx[cuda12]", "mlx[cuda13]"):
        assert f'"{package}>={oldest_mlx}; ' in project
    assert {oldest_mlx, newest_mlx} <= set(EXECUTED) & set(READ)
    pairs = (OLDEST_PAIR, NEWEST_PAIR, MIXED_PAIR)
    first, second, third = (f"mlx {mlx} + mlx-lm {lm}" for mlx, lm in pairs)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{first}, {second} and {third}" in readme


def test_the_docs_have_the_table() -> None:
    assert _mlx_versions.table() in DOCS.read_text()


def test_a_newer_version_is_said_to_be_unknown() -> None:
    (known,) = notes_of("0.32.4")
    same, unknown = notes_of("0.40.0")
    assert same.replace("0.40.0", "0.32.4") == known
    assert "newer than 0.32.4" in unknown
    assert notes_of(None) == ()


@pytest.mark.parametrize("version", ["0.31.2", "0.32.0", "0.32.2", "0.32.4", "9.9.9"])
def test_status_says_what_is_known(tmp_path: Path, version: str) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f'__version__ = "{version}"\n')
    done = child.run(
        f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mlx_safe
        print(json.dumps(mlx_safe.status().as_dict()["mlx_notes"]))
        """
    )
    assert done.returncode == 0, done.stderr
    assert tuple(json.loads(done.stdout)) == notes_of(version)


def test_doctor_says_what_is_known() -> None:
    found = doctor.examine()
    notes = mlx_safe.status().mlx_notes
    assert found["protection"]["mlx_notes"] == list(notes)
    assert notes and all(note in doctor.render(found) for note in notes)
