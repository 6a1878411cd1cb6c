"""Writes a report where it cannot, and dies.

"file": a file takes the place of the directory while the process runs.
"""

import os
import sys
from pathlib import Path

import mlx_safe
from mlx_safe import _reports

mlx_safe.install(signals=True)
directory = Path(os.environ["MLX_SAFE_REPORT_DIR"])
if sys.argv[1:] == ["file"]:
    directory.rename(f"{directory}-away")
    directory.touch()
assert _reports.write("fault", "one") is None
mlx_safe.breadcrumb("still here")
print(mlx_safe.status().reasons, flush=True)
os.abort()
