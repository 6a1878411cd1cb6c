"""The disk is full for two lines, and then not; the argument is the log's path."""

import logging
import pathlib
import resource
import sys

from mlx_safe.server import logs

file = pathlib.Path(sys.argv[1])
logs.set_up("INFO", "json", str(file))
log = logging.getLogger("mlx_safe.server")
log.info("one")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, limits[1]))
log.info("two")
log.info("three")
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
log.info("four")
log.info("five")
