"""The protected server; a stop word says where it is to fail, and how."""

import functools
import sys

import mlx_lm.server as server

from mlx_safe import testing
from mlx_safe.cli import main
from mlx_safe.server.generator import ProtectedResponseGenerator

wanted: dict[str, str] = {}


def fail(where):
    kind = wanted.pop(where, None)
    if kind == "python":
        raise MemoryError
    if kind == "malloc":
        raise RuntimeError("[malloc] Unable to allocate 1073741824 bytes.")
    if kind == "cuda":
        raise RuntimeError(testing.cuda_message(2))


def first(cls, name, where):
    inner = getattr(cls, name)

    @functools.wraps(inner)
    def call(*args, **kwargs):
        fail(where)
        return inner(*args, **kwargs)

    setattr(cls, name, call)


first(server.ResponseGenerator, "_tokenize", "tokenize")
first(server, "_make_sampler", "sampler")
first(server.LRUPromptCache, "fetch_nearest_cache", "fetch")
first(server.LRUPromptCache, "insert_cache", "insert")
first(server, "load", "load")

answer = ProtectedResponseGenerator.answer


def noted(self, request, args, progress):
    for word in args.stop_words:
        if word.startswith("FAIL "):
            _, where, kind = word.split()
            wanted[where] = kind
    return answer(self, request, args, progress)


ProtectedResponseGenerator.answer = noted

sys.exit(main(["serve", *sys.argv[1:]]))
