"""Into a named pipe whose reader reads nothing; the argument is its path."""

import logging
import os
import sys

from mlx_safe.server import logs

reader = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
logs.set_up("INFO", "json", sys.argv[1])
for i in range(2000):
    logging.getLogger("mlx_safe.server").info("line %d, %s", i, "x" * 100)
