"""Waits until the run file says what MLX holds."""

import json
import os
import time
from pathlib import Path

import mlx.core as mx

import mlx_safe
from mlx_safe import _faults, _reports

_faults.LOOK_EVERY_S = _reports.RUN_FILE_EVERY_S = 0.01
held = mx.ones((1 << 20,))
mx.eval(held)
_reports.watch_faults()
path = Path(mlx_safe.status().report_dir or "", f"run-{os.getpid()}.json")
deadline = time.monotonic() + 50
while json.loads(path.read_text())["memory"]["active"] < held.nbytes:
    assert time.monotonic() < deadline
    time.sleep(0.01)
