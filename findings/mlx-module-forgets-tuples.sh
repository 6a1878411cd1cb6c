#!/usr/bin/env bash
# Layers and arrays in a tuple are no part of an nn.Module.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.nn.Module.
# Guess before: a tuple is as good as a list. mlx.utils.tree_flatten and mx.eval take both,
# and nn.Module takes lists and dictionaries, in each other too.
# Seen: parameters(), trainable_parameters(), set_dtype, freeze, eval and save_weights pass
# over what is in a tuple, and nothing is raised. load_weights with such names raises.
# So `self.layers = tuple(…)` makes a model that works. It is not trained and not saved, and
# its layers (dropout) stay in training mode.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

print("mlx", version("mlx"))


class Model(nn.Module):
    def __init__(self, container):
        super().__init__()
        self.layers = container([nn.Linear(2, 2, bias=False), nn.Dropout(0.5)])
        self.plain = container([mx.ones(1)])


def looked_at(container):
    model = Model(container)
    names = [name for name, _ in tree_flatten(model.parameters())]
    model.eval()
    model.set_dtype(mx.float16)
    model.save_weights("a.safetensors")
    linear, dropout = model.layers
    saved = sorted(mx.load("a.safetensors"))
    return names, saved, dropout.training, str(linear.weight.dtype)


in_list, in_tuple = looked_at(list), looked_at(tuple)
print("list: ", *in_list)
print("tuple:", *in_tuple)
names = ["layers.0.weight", "plain.0"]
assert in_list == (names, names, False, "mlx.core.float16")
assert in_tuple == ([], [], True, "mlx.core.float32")
assert len(tree_flatten({"a": (mx.ones(1), mx.ones(1))})) == 2
PYTHON
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$version/bin/python" look.py
done
echo "as written: what is in a tuple is forgotten"
