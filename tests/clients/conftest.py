"""What the tests of the clients share: the stage, and what is missing on it.

``MLX_SAFE_CLIENT_TABLE=FILE`` writes what was seen as the table of docs/clients.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.browser import BROWSERS
from clients.cases import Stage
from clients.proxy import PROXIES, program
from clients.stage import CLIENTS, drivers
from clients.table import table
from support.clients import REQUIRED

TABLE = os.environ.get("MLX_SAFE_CLIENT_TABLE")
HERE = Path(__file__).parent
PAGES = ("test_docs_site.py", "test_status_page.py")


def missing() -> dict[str, str]:
    """Clients and proxies that cannot be run here, and why."""
    found = {c.name: reason for c in CLIENTS if (reason := c.missing())}
    found.update({name: name for name in PROXIES if not program(name)})
    if not any(map(shutil.which, BROWSERS)):
        found.update(dict.fromkeys(PAGES, "chromium (make client-browser)"))
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves out the tests of what is missing."""
    lost = {} if REQUIRED else missing()
    gone = []
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        names = {getattr(value, "name", value) for value in values}
        names.add(item.path.name)
        if HERE in item.path.parents and any(name in lost for name in names):
            gone.append(item)
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=gone)
    config.stash[left_out] = lost


left_out = pytest.StashKey[dict[str, str]]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for name, reason in config.stash.get(left_out, {}).items():
        terminalreporter.write_line(
            f"did not run: the tests of {name}: {reason} is not installed"
        )


@pytest.fixture(scope="session")
def stage(
    tiny_model: Path, scripted_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    lost = missing()
    assert not (REQUIRED and lost), f"not installed: {', '.join(lost.values())}"
    clients = [c for c in CLIENTS if c.name not in lost]
    with drivers(clients) as found:
        stage = Stage(tiny_model, scripted_model, tmp_path_factory.mktemp("s"), found)
        try:
            yield stage
        finally:
            stage.stop()
    if TABLE:
        Path(TABLE).write_text(table(clients, stage.seen) + "\n")
