"""What a large request leaves behind."""

from __future__ import annotations

import sys

import pytest

from support import child
from support.programs import program


def resident(**environment: str) -> int:
    done = child.run(program("frees_in_many_threads"), timeout=60, **environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="it is of glibc")
def test_what_eight_threads_have_freed_is_given_back() -> None:
    """Eight times 24 MB, which glibc keeps, and a server does not."""
    kept, given_back = resident(), resident(SERVES="1")
    assert kept > 150
    assert given_back < 50
