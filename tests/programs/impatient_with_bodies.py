"""The protected server, which waits little for the rest of a body."""

import sys

from mlx_safe.cli import main
from mlx_safe.server import body

body.GRACE_S = 1.0
body.WAIT_S = 0.5
body.SMALL_TOTAL = body.SMALL
sys.exit(main(["serve", *sys.argv[1:]]))
