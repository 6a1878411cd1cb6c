"""The protected server; the first two processes of it never load their model.

LIVES: a file that each of them makes longer.
"""

import os
import sys
import time
from pathlib import Path

import mlx_lm.server

from mlx_safe.cli import main

with Path(os.environ["LIVES"]).open("ab") as lives:
    lives.write(b".")
if Path(os.environ["LIVES"]).stat().st_size < 3:
    mlx_lm.server.ModelProvider.load_default = lambda self: time.sleep(600)
sys.exit(main(["serve", *sys.argv[1:]]))
