"""Upgrades from 0.1.0 as a user would: check_upgrade.py WHEEL...

The last commit with that version is built. Its server writes KV caches, and dies of an
exception that nobody catches, which leaves a crash report. Then pip installs the wheel
over it. The new version must list and show the report, find the caches whole, go on
with the conversation from them, and say what the old one said.

Needs the project's history, and pip's index. Exit status: 0; 1: something did not work,
or could not be tried, which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from check_release import fitting

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import server as servers  # noqa: E402
from support.server import Answer, Server, eventually  # noqa: E402

OLD = "0.1.0"
DIES = "any:30:8:once:terminate"
NO_END = {"0": -100, "2": -100}
TURNS = ["of ships and the sea " * 60, "and of the wind"]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs it to its end; its stdout.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def old_wheel(directory: Path) -> Path:
    """Built from the last commit that had the version `OLD`.

    Raises:
        AssertionError: there is no such commit here, or no wheel of it.
    """
    of_version = ("--format=%H", f'-S"{OLD}"', "--", "src/mlx_safe/_version.py")
    commits = run("git", "log", *of_version).split()
    assert len(commits) > 1, f"the commits of {OLD} are not in this checkout"
    source = directory / "source"
    source.mkdir()
    run("git", "archive", f"--output={directory}/old.tar", f"{commits[0]}^")
    run("tar", "-xf", directory / "old.tar", "-C", source)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", directory)
    run(sys.executable, *build, source)
    (wheel,) = directory.glob(f"mlx_safe-{OLD}-*.whl")
    return wheel


class Upgrade:
    """An environment with a version, and the directories that stay.

    Args:
        directory: an empty one.
    """

    def __init__(self, directory: Path) -> None:
        run(sys.executable, "-m", "venv", directory / "venv")
        self._python = directory / "venv" / "bin" / "python"
        self._mlx_safe = directory / "venv" / "bin" / "mlx-safe"
        self._model, self._kv = directory / "model", directory / "kv"
        self._env = {"MLX_SAFE_REPORT_DIR": str(directory / "reports")}
        servers.PYTHON = str(self._python)

    def install(self, wheel: Path) -> None:
        extras = "server" if sys.platform == "darwin" else "server,cpu"
        said = f"mlx-safe[{extras}] @ {wheel.as_uri()}"
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(self._python, *pip, "--upgrade", said)

    def tool(self, *arguments: str) -> str:
        return run(self._mlx_safe, *arguments, env=self._env)

    def make_model(self) -> None:
        make = ROOT / "tests" / "support" / "tiny_model.py"
        run(self._python, make, self._model)

    def serve(self, *arguments: str, inject: str = "") -> Server:
        server = Server(self._model, *arguments, inject=inject, env=self._env)
        return server.wait_ready()

    def converse(self, turns: int) -> tuple[list[str], Server]:
        """So many turns of the conversation, with caches on disk."""
        messages: list[dict[str, Any]] = []
        texts = []
        with self.serve("--kv-dir", str(self._kv)) as server:
            for turn in TURNS[:turns]:
                messages.append({"role": "user", "content": turn})
                answer = ask(server, messages)
                assert answer.status == 200, answer.body
                texts.append(answer.text)
                messages.append({"role": "assistant", "content": answer.text})
            files = "mlx_safe_kv_disk_files"
            assert eventually(lambda: server.metric(files) > 0), server.log
            self.restored = server.metric("mlx_safe_kv_disk_restored_tokens_total")
        return texts, server


def ask(server: Server, messages: list[dict[str, Any]]) -> Answer:
    return server.post({"messages": messages, "max_tokens": 8, "logit_bias": NO_END})


def upgrade(new: Path, directory: Path) -> str:
    """Tries it; one line on what came of it.

    Raises:
        AssertionError: it did not work.
    """
    place = Upgrade(directory)
    place.install(old_wheel(directory))
    assert OLD in place.tool("--version")
    place.make_model()
    with place.serve(inject=DIES) as server:
        ask(server, [{"role": "user", "content": "hello"}] * 5)
        for _ in range(20):
            if server.process.poll() is None:
                ask(server, [{"role": "user", "content": "hello"}])
        assert server.wait() != 0, server.log
    before = json.loads(place.tool("reports", "--json"))
    assert before, "no crash report"
    whole, _ = place.converse(2)
    # The caches of the first turn alone, so that the second one begins from them.
    place.tool("kv", "empty", str(directory / "kv"))
    first, _ = place.converse(1)
    assert first == whole[:1]

    place.install(new)
    version = place.tool("--version").split()[1]
    assert version == new.name.split("-")[1], version
    after = json.loads(place.tool("reports", "--json"))
    assert names(before) <= names(after), (before, after)
    shown = place.tool("reports", "show")
    assert "exception" in shown, shown
    place.tool("kv", "check", str(directory / "kv"))
    again, server = place.converse(2)
    assert again == whole, (again, whole)
    assert place.restored >= 256, f"nothing restored:\n{server.log}"
    return (
        f"{OLD} to {version}: {len(before)} crash report read, "
        f"{place.restored:.0f} tokens restored from its KV caches, the same text"
    )


def names(reports: list[dict[str, Any]]) -> set[str]:
    return {str(report["id"]) for report in reports}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=lambda name: Path(name).resolve())
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    wheel = fitting(parser.parse_args().wheels, version)
    try:
        assert wheel is not None, f"no wheel for Python {version}"
        with tempfile.TemporaryDirectory() as directory:
            print(upgrade(wheel, Path(directory)))
    except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as e:
        print(f"check_upgrade: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
