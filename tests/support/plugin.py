"""A model and a program for the tests of the pytest plugin, as its users write them."""

from __future__ import annotations

import pytest

from support.programs import program

# Of the plugins of our tests, those that take a second each time.
NOT_LOADED = ("cacheprovider", "schemathesis", "hypothesispytest", "anyio")


def run(pytester: pytest.Pytester, tests: str, *arguments: str) -> pytest.RunResult:
    """Runs ``tests`` with ``programs/plugin_model.py`` in a pytest of their own."""
    pytester.makepyfile(
        plugin_model=program("plugin_model"),
        test_it=f"from plugin_model import *\n{tests}",
    )
    without = [word for name in NOT_LOADED for word in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess(*without, *arguments)
