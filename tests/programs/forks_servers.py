"""Has imported once what each server takes half a second for, and forks.

Nothing of MLX, mlx-lm or mlx-safe, and no thread. The argument is the number of a
socket. A message of it has a command and its environment, and the child's standard
streams with it. The answers are the child's pid, and that it is an orphan: whoever
takes in orphans is its parent then.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import types

import prometheus_client  # noqa: F401
import pydantic
from huggingface_hub import snapshot_download  # noqa: F401
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


class Warms(pydantic.BaseModel):  # what pydantic imports for its first model
    number: int


MESSAGE_MAX = 1 << 20


def fork(asked):
    """In the child: what it is to run, and its streams. In here: None."""
    while True:
        data, streams, _, _ = socket.recv_fds(asked, MESSAGE_MAX, 3)
        if not data:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if pid := os.fork():
                asked.send(str(pid).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            return json.loads(data), streams
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)
        asked.send(b"an orphan")


def become(streams, environment):
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)


with socket.socket(fileno=int(sys.argv[1])) as asked:
    # The terminal's ^C is for who asks.
    default = signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    (command, environment), streams = fork(asked)
signal.signal(signal.SIGINT, default)
become(streams, environment)
sys.orig_argv[:] = command
option, what, *arguments = command[1:]
sys.argv[:] = [option, *arguments]
if option == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(main))
