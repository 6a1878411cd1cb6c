"""The protected server, which fails at answers with the stop word "fail"."""

import sys

from mlx_safe.cli import main
from mlx_safe.server import answers

frame = answers.Answer._frame


def failing(self, choices):
    if self._handler.body.get("stop") == ["fail"]:
        raise LookupError("the secret text")
    return frame(self, choices)


answers.Answer._frame = failing
sys.exit(main(["serve", *sys.argv[1:]]))
