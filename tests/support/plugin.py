"""A model and a program for the tests of the pytest plugin, as its users write them."""

from __future__ import annotations

import pytest

# What every test file begins with: a model as mlx-lm's, without a file.
MODEL = """
import os, subprocess, sys
import mlx.core as mx
import mlx.nn as nn
import pytest

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Layer()
        self.layers = []
    def __call__(self, inputs, cache=None, input_embeddings=None):
        embeddings = input_embeddings
        if embeddings is None:
            embeddings = self.model.embed(inputs)
        return embeddings @ self.model.embed.weight.T

def load():
    model = Model()
    return model.load_weights([], strict=False)

@pytest.fixture(scope="module")
def model():
    return load()

PROMPT, TOKEN = mx.array([[1, 2, 3]]), mx.array([[4]])
PROGRAM = "from test_it import *; m = load(); m(PROMPT); [m(TOKEN) for _ in range(3)]"

def run(env):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True
    )
"""


def run(pytester: pytest.Pytester, tests: str, *arguments: str) -> pytest.RunResult:
    """Runs ``tests``, which have `MODEL` before them, in a pytest of their own."""
    pytester.makepyfile(test_it=MODEL + tests)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
