"""Dies on a full disk, after two reports that it had no room for."""

import ctypes
import os

import mlx_safe
from mlx_safe import _reports

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
for i in range(300):
    mlx_safe.breadcrumb("x" * 90, i=i)
ctypes.CDLL(None).full_disk(0)
assert _reports.write("fault", "one") is None
assert _reports.write("fault", "two") is None
run_file = f"run-{os.getpid()}.json"
assert os.listdir(mlx_safe.status().report_dir) == [run_file]
os.abort()
