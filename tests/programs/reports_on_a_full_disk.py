"""Two reports that a full disk has no room for."""

import logging
import resource

logging.basicConfig()
import mlx_safe
from mlx_safe import _reports

resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
assert _reports.write("fault", "one") is None
assert _reports.write("fault", "two") is None
assert mlx_safe.status().reports_failed == 2
assert mlx_safe.install().installed
