"""Before a server: every rank but the first is a second late to load its model."""

import functools
import os
import time

import mlx_lm.utils as utils

load = utils.load_model


@functools.wraps(load)
def late(*args, **kwargs):
    time.sleep(1 if os.environ["MLX_RANK"] != "0" else 0)
    return load(*args, **kwargs)


utils.load_model = late
