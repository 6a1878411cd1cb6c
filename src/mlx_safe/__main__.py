"""``python -m mlx_safe`` is ``mlx-safe``."""

import sys

from .cli import main

sys.exit(main())
