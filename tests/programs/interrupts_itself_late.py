"""The protected server, with a Control-C when its generation thread runs."""

import signal
import sys

from mlx_safe.server import recorder, serve

sampled = recorder.start_sampler


def start_sampler(*args: object) -> None:
    sampled(*args)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGINT)


recorder.start_sampler = start_sampler
serve.serve(sys.argv[1:])
