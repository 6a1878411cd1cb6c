"""What a test file of the plugin's tests begins with: a model as mlx-lm's, no file."""

import subprocess
import sys

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
PROGRAM = (
    "from plugin_model import *; m = load(); m(PROMPT); [m(TOKEN) for _ in range(3)]"
)


def run(env):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True
    )
