"""MODEL DIRECTORY: writes an adapter that changes what the model says."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

directory = Path(sys.argv[2])
model, _ = load(sys.argv[1])
parameters = {"rank": 4, "scale": 8.0, "dropout": 0.0}
model.freeze()
linear_to_lora_layers(model, 2, parameters)
mx.random.seed(5)
weights = {
    k: mx.random.normal(v.shape) for k, v in tree_flatten(model.trainable_parameters())
}
mx.save_safetensors(str(directory / "adapters.safetensors"), weights)
config = {"num_layers": 2, "lora_parameters": parameters}
(directory / "adapter_config.json").write_text(json.dumps(config))
