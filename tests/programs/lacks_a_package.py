"""NAME: a server on a machine that has no package of that name."""

import importlib.util
import sys

from mlx_safe.cli import main

find = importlib.util.find_spec


def finds_others(name, *more):
    return None if name == sys.argv[1] else find(name, *more)


importlib.util.find_spec = finds_others
sys.exit(main(["serve"]))
