"""MODEL FLAGS...: says how a server takes each of these lists of flags, in JSON."""

import contextlib
import io
import json
import sys

from mlx_safe.cli import main

for flags in map(json.loads, sys.argv[2:]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = main(["serve", "--model", sys.argv[1], *flags])
        except SystemExit as e:
            status = e.code
    print(status, said.getvalue().strip().splitlines()[-1])
