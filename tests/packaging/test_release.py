"""One version, a changelog that knows it, and an sdist that has everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import release_notes

ROOT = Path(__file__).parents[2]
# In the repository, and of no use to a build from an sdist.
NOT_IN_SDIST = (".github/",)
MADE_BY_THE_BACK_END = {"PKG-INFO"}


def members(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        names = [m.name for m in archive.getmembers() if not m.isdir()]
    return {name.partition("/")[2] for name in names}


def test_the_sdist_is_complete(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so what git tracks cannot be told")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {name for name in listed if not name.startswith(NOT_IN_SDIST)}
    assert members(sdist) == expected | MADE_BY_THE_BACK_END


def test_an_unpacked_sdist_makes_the_same_sdist(sdist: Path, tmp_path: Path) -> None:
    """To the byte, though there is no git to ask for the files and for the time."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / sdist.name.removesuffix(".tar.gz")
    (root / ".venvs").mkdir()
    (root / ".venvs" / "wheels").symlink_to(sys.prefix)
    for installed in ("wheels.tools", "uv.tools"):
        (root / ".venvs" / installed).touch()
    made_by_make = ("SOURCE_DATE_EPOCH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in made_by_make}
    done = subprocess.run(
        ["make", "sdist"],
        cwd=root,
        env={**environment, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "dist" / sdist.name).read_bytes() == sdist.read_bytes()


def test_every_wheel_and_the_sdist_are_of_the_one_version(sdist: Path) -> None:
    version = release_notes.version()
    assert sdist.name == f"mlx_safe-{version}.tar.gz"
    for wheel in sdist.parent.glob("*.whl"):
        assert wheel.name.startswith(f"mlx_safe-{version}-")


def test_the_version_is_written_once() -> None:
    version = release_notes.version()
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", version)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'input = "src/mlx_safe/_version.py"' in project
    assert version not in (ROOT / "CMakeLists.txt").read_text()


def test_the_changelog_knows_the_version() -> None:
    """It is released already, or next: then its changes are under Unreleased."""
    known = release_notes.sections()
    assert release_notes.version() in known or known.get("Unreleased")


def test_the_workflow_releases_by_tag_what_the_changelog_tells() -> None:
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert '"v*"' in workflow
    assert "tools/release_notes.py" in workflow
    assert "check_wheel.py --complete" in workflow


def project(root: Path, version: str, changelog: str) -> Path:
    (root / "src" / "mlx_safe").mkdir(parents=True)
    file = root / "src" / "mlx_safe" / "_version.py"
    file.write_text(f'__version__ = "{version}"\n')
    (root / "CHANGELOG.md").write_text(changelog)
    return root


def test_a_tag_has_its_notes(tmp_path: Path) -> None:
    log = "# Changelog\n\n## [1.2.0] - 2027-01-01\n\n- New.\n\n## 1.1.0\n\n- Old.\n"
    assert release_notes.notes("v1.2.0", project(tmp_path, "1.2.0", log)) == "- New."


@pytest.mark.parametrize(
    ("tag", "changelog", "complaint"),
    [
        ("v1.3.0", "## 1.2.0\n\n- New.\n", "says 1.2.0"),
        ("v1.2.0", "## Unreleased\n\n- New.\n", "rename its section Unreleased"),
        ("v1.2.0", "## 1.2.0\n\n## 1.1.0\n\n- Old.\n", "says nothing of 1.2.0"),
    ],
)
def test_a_tag_that_is_no_release_is_refused(
    tag: str, changelog: str, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        release_notes.notes(tag, project(tmp_path, "1.2.0", changelog))
