"""Which mlx-lm this server runs with, and what to install when another is there."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from typing import cast

from ..._command import MLX, CommandError, in_one_line, need_mlx
from ..._mlx_versions import parse_version
from .protocols.models import CliArgs, ModelProvider
from .protocols.server import Server
from .seams import missing_of_provider, missing_seams

__all__ = [
    "SUPPORTED",
    "check_parser",
    "check_provider",
    "import_server",
    "installed_version",
]

# From requirements/versions.mk, which a test compares it with, and pyproject.toml.
REQUIREMENT = "mlx-lm>=0.31.3,<0.33"
# Oldest version, and the first that is too new.
SUPPORTED = tuple(parse_version(v) for v in re.findall("[0-9.]+", REQUIREMENT))
INSTALL = f"pip install '{REQUIREMENT}'"
# Module, and the package that has it: what the extra "server" stands for.
NEEDED = {
    "mlx": MLX,
    "mlx_lm": REQUIREMENT,
    "prometheus_client": "prometheus-client>=0.20",
    "pydantic": "pydantic>=2.7",
    "rich": "rich>=13",
    # Python's own since 3.11.
    **({"tomli": "tomli>=2"} if sys.version_info < (3, 11) else {}),
}


def check_provider(provider: ModelProvider) -> None:
    """Looks at mlx-lm's `ModelProvider`, which only its ``main`` can make.

    Raises:
        CommandError: it does not have what the patch needs.
    """
    _refuse(missing_of_provider(provider))


def check_parser(parser: argparse.ArgumentParser) -> None:
    """Looks at mlx-lm's parser.

    Raises:
        CommandError: it does not have the flags that this server reads.
    """
    there = {action.dest for action in parser._actions}
    _refuse(
        [f"its flag {x} is gone" for x in CliArgs.__annotations__ if x not in there]
    )


def _refuse(missing: list[str]) -> None:
    if missing:
        raise CommandError(
            f"mlx-lm {installed_version()} does not fit this mlx-safe "
            f"({'; '.join(missing)}): {INSTALL}"
        )


def installed_version() -> str:
    """The version of mlx-lm that an import finds. Any thread."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlx-lm")
    except PackageNotFoundError:
        from mlx_lm import __version__

        return str(__version__)


def import_server(*, allow_untested: bool = False) -> Server:
    """The module ``mlx_lm.server``, checked; imports mlx and mlx-lm. Main thread.

    Args:
        allow_untested: take one that is newer than `SUPPORTED`, if it fits.

    Raises:
        CommandError: mlx or mlx-lm is missing, too old or too new; the one
            line says what to install.
    """
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            name = module.replace("_", "-")
            raise CommandError(f"{name} is not installed: pip install '{package}'")
    need_mlx()
    found = installed_version()
    oldest, too_new = SUPPORTED
    if parse_version(found) < oldest:
        raise CommandError(f"mlx-lm {found} is too old: {INSTALL}")
    if parse_version(found) >= too_new and not allow_untested:
        raise CommandError(
            f"mlx-lm {found} is newer than this mlx-safe knows: {INSTALL}, or try "
            "it with --allow-untested-mlx-lm"
        )
    try:
        import mlx_lm.server as server
    except Exception as e:  # also what it imports may be broken
        raise CommandError(
            f"mlx-lm {found} cannot be imported ({in_one_line(e)}): {INSTALL}"
        ) from e
    _refuse(missing_seams(server))
    return cast(Server, server)
