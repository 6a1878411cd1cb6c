"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.card import is_card, round_alike
from support.clients import HAS_CURL
from support.models import make_model
from support.native import Native

ROOT = Path(__file__).parent
LEFT_OUT = "mlx_safe_left_out"

# nohup, and shells in what they start in the background, have these ignored; a child
# inherits that. With a handler here it begins with the default.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)
# What starts this may have blocked some, which a child inherits as well.
signal.pthread_sigmask(signal.SIG_SETMASK, [])
# Many die on purpose. Who waits for one waits until its core is written, and that of a
# server with a card is large.
resource.setrlimit(
    resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
)

round_alike()

# Before any test imports mlx_safe, which at once says there that it runs.
_reports_of_this_process = tempfile.TemporaryDirectory()
os.environ["MLX_SAFE_REPORT_DIR"] = _reports_of_this_process.name

# What every child starts with: support/startup/sitecustomize.py. The workers of
# pytest-xdist have it of the process that started them.
if "MLX_SAFE_TEST_IMPORTS" not in os.environ:
    _imports = tempfile.TemporaryDirectory()
    os.environ["MLX_SAFE_TEST_IMPORTS"] = str(Path(_imports.name) / "imports")
    _path = [str(ROOT / "support" / "startup"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _path))

# What reads wheels needs the tools of `make check-wheels` and `make contract`.
READS_WHEELS = importlib.util.find_spec("lief") is not None
collect_ignore = [] if READS_WHEELS else ["contract", "machrun", "packaging"]
# And what needs clients and proxies those of `make test-clients`.
HAS_CLIENTS = os.environ.get("MLX_SAFE_TEST_CLIENTS") == "1"
collect_ignore += [] if HAS_CLIENTS else ["clients"]
# Servers of others have environments of their own: `make test-servers`.
HAS_SERVERS = os.environ.get("MLX_SAFE_TEST_SERVERS") == "1"
collect_ignore += [] if HAS_SERVERS else ["servers"]
# Minutes of both cores: `make test-scoreboard`.
HAS_SCOREBOARD = os.environ.get("MLX_SAFE_TEST_SCOREBOARD") == "1"
collect_ignore += [] if HAS_SCOREBOARD else ["scoreboard"]

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, Phase, settings

    # Here, as `@given` takes what holds when its file is read. No luck in CI: the
    # same cases each time, and however slow the machine is. Nothing is remembered.
    settings.register_profile(
        "fixed",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    # `make fuzz`: with the seed of the command line.
    settings.register_profile(
        "fuzz",
        settings.get_profile("fixed"),
        derandomize=False,
        max_examples=500,
        print_blob=True,
    )
    # `make mutants` asks only whether there is a failure.
    settings.register_profile(
        "mutants",
        settings.get_profile("fixed"),
        phases=[Phase.explicit, Phase.generate],
    )
    settings.load_profile(os.environ.get("MLX_SAFE_TEST_PROFILE", "fixed"))


def pytest_report_header() -> list[str]:
    lines = []
    if not READS_WHEELS:
        lines.append(
            "tests/contract, tests/machrun, tests/packaging: left out: make contract, "
            "machrun, check-wheels"
        )
    if not HAS_CLIENTS:
        lines.append("tests/clients: left out: make test-clients")
    if not HAS_SERVERS:
        lines.append("tests/servers: left out: make test-servers")
    if not HAS_SCOREBOARD:
        lines.append("tests/scoreboard: left out: make test-scoreboard")
    return lines


def why_no_hardware() -> str | None:
    """Why the tests of tests/hardware do not run here; None when they do."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return "this machine has no Metal"
    if os.environ.get("MLX_SAFE_TEST_HARDWARE") != "1":
        return "they run the GPU out of memory; `make hardware-report` runs them"
    return None


def why_no_card() -> str | None:
    """The same of tests/hardware/test_cuda.py."""
    if os.environ.get("MLX_SAFE_TEST_HARDWARE") != "1":
        return "they run the card out of memory; MLX_SAFE_TEST_HARDWARE=1 runs them"
    return None if is_card() else "MLX computes on no CUDA card here"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves out what needs Metal, or what is not built, and says so."""
    told = config.stash[left_out] = []
    if reason := why_no_hardware():
        hardware = [item for item in items if item.get_closest_marker("requires_metal")]
        leave_out(config, items, hardware)
        if hardware:
            told.append(f"{len(hardware)} tests of tests/hardware: {reason}")
    if reason := why_no_card():
        cuda = [item for item in items if item.get_closest_marker("requires_cuda")]
        leave_out(config, items, cuda)
        if cuda:
            told.append(f"{len(cuda)} tests of tests/hardware/test_cuda.py: {reason}")
    if os.environ.get("MLX_SAFE_TEST_NATIVE") == "none":
        native = [i for i in items if "native" in getattr(i, "fixturenames", ())]
        leave_out(config, items, native)
        told.append(f"{len(native)} tests that need tests/native: it is not built")
    if not HAS_CURL:
        told.append("curl, as one of the clients of the tests: it is not installed")


def leave_out(
    config: pytest.Config, items: list[pytest.Item], which: list[pytest.Item]
) -> None:
    items[:] = [item for item in items if item not in which]
    config.hook.pytest_deselected(items=which)


left_out = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: what it left out is said once, by us."""
    told = node.config.stash.setdefault(left_out, [])
    told += [
        line
        for line in getattr(node, "workeroutput", {}).get(LEFT_OUT, [])
        if line not in told
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        told = session.config.stash.get(left_out, [])
        session.config.workeroutput[LEFT_OUT] = told


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(left_out, []):
        terminalreporter.write_line(f"did not run: {line}")


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a model, or finds the one that another worker has made."""
    ours = tmp_path_factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours

    def make(name: str, program: str, *arguments: str) -> Path:
        directory = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                made = make_model(program, ours / f"{name}-made", *arguments)
                made.rename(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_model(make_once: MakeModel) -> Path:
    """Directory of the tiny random model.

    ``MLX_SAFE_TEST_TINY_MODEL``: one that was made where numbers are right.
    """
    if given := os.environ.get("MLX_SAFE_TEST_TINY_MODEL"):
        return Path(given)
    return make_once("tiny-model", "tiny_model.py")


@pytest.fixture(scope="session")
def draft_model(make_once: MakeModel) -> Path:
    """Another tiny random model, which drafts little of what the first says."""
    return make_once("draft-model", "tiny_model.py", "1")


@pytest.fixture(scope="session")
def wide_model(make_once: MakeModel) -> Path:
    """A tiny random model of several times that size."""
    return make_once("wide-model", "tiny_model.py", "0", "256")


@pytest.fixture(scope="session")
def scripted_model(make_once: MakeModel) -> Path:
    """Directory of the model that thinks and calls a tool."""
    return make_once("scripted-model", "scripted_model.py")


@pytest.fixture(scope="session")
def scripted_draft_model(make_once: MakeModel) -> Path:
    """Follows the same script, but makes other choices."""
    return make_once("scripted-draft-model", "scripted_model.py", "1")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Directory of SmolLM2-135M-Instruct; `make test` prepares it."""
    path = os.environ.get("MLX_SAFE_TEST_MODEL")
    if not path:
        pytest.fail("set MLX_SAFE_TEST_MODEL, or run the suite with `make test`")
    return Path(path)


@pytest.fixture(autouse=True)
def private_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the user's own report directory."""
    directory = tmp_path / "reports"
    monkeypatch.setenv("MLX_SAFE_REPORT_DIR", str(directory))
    return directory


@pytest.fixture(scope="session")
def native() -> Native:
    path = os.environ.get("MLX_SAFE_TEST_NATIVE")
    if not path:
        pytest.fail("set MLX_SAFE_TEST_NATIVE, or run the suite with `make test`")
    return Native(Path(path).resolve())
