"""Is killed with a request in flight."""

import os
import signal

from mlx_safe import _core, _reports

_core.sample_memory(2, 1, 3, 5)
place = _core.request_begin("cmpl-1", "/v1/completions")
_core.request_progress(place, 100, 64, 3)
_reports.refresh_run_file()
os.kill(os.getpid(), signal.SIGKILL)
