"""A line of each level, one of them with a traceback."""

import logging

from mlx_safe.server import logs

logs.set_up("DEBUG", "text")
log = logging.getLogger("mlx_safe.server")
log.debug("one")
log.info("two")
log.warning("three")
try:
    raise ValueError("four")
except ValueError:
    log.exception("a handler failed")
log.critical("five")
