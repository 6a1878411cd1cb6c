"""VICTIM: writes a report where all its names are links to a file."""

import os
import sys
from pathlib import Path

directory = Path(os.environ["MLX_SAFE_REPORT_DIR"])
directory.mkdir(parents=True)
for name in (".stacks-{}", ".stacks-{}-python", ".run-{}", ".reserve-{}"):
    (directory / name.format(os.getpid())).symlink_to(sys.argv[1])

import mlx_safe
from mlx_safe import _reports

mlx_safe.install(signals=True)
assert _reports.write("fault", "")
