#!/usr/bin/env bash
# Metadata of a saved prompt cache come back as other dictionaries, or as a list.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), save_prompt_cache and
# load_prompt_cache(return_metadata=True).
# Guess before: "metadata (Dict[str, str])" goes in, and the same comes out. Safetensors
# keeps any two strings, so nothing stands against it.
# Seen: a dot in a key makes a dictionary in a dictionary, and a key that is a number a list, at
# the top as well: {"0": "x"} is ["x"], and {"v1.5": "y"} has a list of six, five of them empty
# dictionaries. Keys such as names of models, versions and file names ("a.txt") do that. The
# cache itself and the values are right. Nothing is said.
# Put one JSON text under one plain key.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  (cd "$work" && "$work/$mlx/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
cache = KVCache()
cache.update_and_fetch(mx.ones((1, 1, 3, 4)), mx.ones((1, 1, 3, 4)))
for metadata, seen in (
    ({"model": "llama-3.1"}, {"model": "llama-3.1"}),
    ({"llama-3.x": "m"}, {"llama-3": {"x": "m"}}),
    ({"a.txt": "one", "a.md": "two"}, {"a": {"txt": "one", "md": "two"}}),
    ({"0": "x"}, ["x"]),
    ({"v1.5": "y"}, {"v1": [{}, {}, {}, {}, {}, "y"]}),
):
    save_prompt_cache("cache.safetensors", [cache], metadata)
    (loaded,), found = load_prompt_cache("cache.safetensors", return_metadata=True)
    print(metadata, "->", found)
    assert found == seen
    assert loaded.offset == 3
PYTHON
  )
done
echo "as written: another shape"
