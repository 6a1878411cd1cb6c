"""A program with a loader of its own, as a server that vendors mlx-lm has.

The parts are called by name and with embeddings.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

directory = Path(sys.argv[1])
config = json.loads((directory / "config.json").read_text())
Model, Arguments = _get_classes(config)
model = Model(Arguments.from_dict(config))
weights: dict[str, mx.array] = {}
for file in directory.glob("*.safetensors"):
    weights.update(mx.load(str(file)))  # type: ignore[arg-type]
model.load_weights(list(weights.items()), strict=False)
tokens = mx.array([[5, 6, 7, 8]])
embeddings = model.model.embed_tokens(tokens)
cache = make_prompt_cache(model)
calls = [
    lambda: model(inputs=tokens, cache=cache),
    lambda: model(None, cache, input_embeddings=embeddings),
    lambda: model.model(tokens[:, :1], cache=cache),
    lambda: model.model(inputs=None, cache=cache, input_embeddings=embeddings[:, :1]),
]
for number, call in enumerate(calls, 1):
    try:
        mx.eval(call())
    except RuntimeError as e:
        print("call", number, "failed", e)
