"""What `make lint` says of the subjects of commits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import commit_subjects
import pytest

git = shutil.which("git")


def commit(repository: Path, subject: str, when: str) -> None:
    name = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    message = ["commit", "--quiet", "--allow-empty", f"--date={when}", "-m", subject]
    environment = {"GIT_COMMITTER_DATE": when, "PATH": str(Path(git or "").parent)}
    subprocess.run(
        ["git", *name, *message], cwd=repository, check=True, env=environment
    )


@pytest.mark.skipif(git is None, reason="git is not installed")
def test_long_subjects_are_named(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    commit(tmp_path, "x" * 90, "2026-11-27T12:00:00Z")
    commit(tmp_path, "y" * 72, "2026-11-29T12:00:00Z")
    assert commit_subjects.long_ones(tmp_path) == []
    commit(tmp_path, "z" * 73, "2026-11-29T13:00:00Z")
    (found,) = commit_subjects.long_ones(tmp_path) or []
    assert found.endswith(": " + "z" * 73)


def test_without_history_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not the repository that a temporary directory may lie in.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(commit_subjects, "ROOT", tmp_path)
    assert commit_subjects.main() == 0
    assert capsys.readouterr().out.startswith("left out: ")
