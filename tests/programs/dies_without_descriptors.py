"""Dies when no descriptor is left."""

import os
import resource

import mlx_safe

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(1)
except OSError:
    os.abort()
