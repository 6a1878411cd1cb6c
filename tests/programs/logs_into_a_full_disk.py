"""The disk is full for two lines, and then not; the argument is the log's path.

With "moved" the file is moved away, and the disk stays full for what is in it.
"""

import logging
import pathlib
import resource
import sys

from mlx_safe.server import logs

file = pathlib.Path(sys.argv[1])
logs.set_up("INFO", "json", str(file))
log = logging.getLogger("mlx_safe.server")
log.info("one, which is the longest line of all of them")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, limits[1]))
log.info("two")
log.info("three")
if "moved" in sys.argv:
    file.rename(f"{file}.1")
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
log.info("four")
log.info("five")
