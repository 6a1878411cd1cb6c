"""The native hosts send Metal what the real libmlx sends, in the same order.

What that is was recorded from MLX's own macOS binaries, executed by tests/machrun.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import sent
from support.native import Native
from support.versions import EXECUTED, NEWEST_PAIR, OLDEST_PAIR


@pytest.mark.parametrize("version", EXECUTED)
def test_the_host_sends_what_libmlx_sends(
    version: str, native: Native, tmp_path: Path
) -> None:
    regime = "intercept" if version < "0.32" else "observe"

    def traced(workload: str, fault: int) -> str:
        path = tmp_path / f"{workload}-{fault}"
        options = ["--rounds=1", f"--fail-nth={fault}", f"--mlx={version}"]
        native.host(regime, workload, *options, f"--trace={path}", hooks=False)
        return path.read_text()

    file = sent.recorded(version)
    found = sent.differences(file.read_text(), sent.all_of(traced))
    assert not found, f"the host, as mlx {version}, and {file.name}:\n{found}"


def test_a_difference_is_told() -> None:
    """The other side: the versions' own traces differ."""
    old, new = (sent.recorded(v).read_text() for v, _ in (OLDEST_PAIR, NEWEST_PAIR))
    assert "+buffer status" in sent.differences(new, old)
    assert sent.differences(new, new) == ""
