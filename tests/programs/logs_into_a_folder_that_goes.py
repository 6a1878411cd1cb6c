"""The folder of the log is removed, and comes back; its path is the argument."""

import logging
import pathlib
import shutil
import sys

from mlx_safe.server import logs

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
logs.set_up("INFO", "text", str(folder / "serve.log"))
log = logging.getLogger("mlx_safe.server")
log.info("one")
shutil.rmtree(folder)
log.info("two")
folder.mkdir()
log.info("three")
print((folder / "serve.log").read_text())
