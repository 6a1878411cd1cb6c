#!/usr/bin/env bash
# safetensors' own module for MLX cannot read or write bfloat16.
#
# Package: safetensors 0.8.0 with mlx 0.32.4, safetensors.mlx and
# safe_open(…, framework="mlx").
# Guess before: it takes what MLX has. bfloat16 is what nearly all models for MLX are in.
# Seen: all goes by way of NumPy, which has no bfloat16. load_file and safe_open raise
# TypeError "data type 'bfloat16' not understood", load KeyError 'BF16', save and save_file
# ValueError. Once ml_dtypes was imported, load_file and safe_open read it; load, save and
# save_file never do. mx.load and mx.save_safetensors have it all, and need nothing else.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys

if sys.argv[1:]:
    import ml_dtypes  # noqa: F401
import mlx.core as mx
import safetensors
import safetensors.mlx

mx.save_safetensors("a.safetensors", {"w": mx.array([1.5, 2], mx.bfloat16)})
with open("a.safetensors", "rb") as file:
    data = file.read()
tensors = mx.load("a.safetensors")
assert tensors["w"].dtype == mx.bfloat16

WAYS = {
    "load_file": lambda: safetensors.mlx.load_file("a.safetensors")["w"],
    "safe_open": lambda: safetensors.safe_open("a.safetensors", "mlx").get_tensor("w"),
    "load": lambda: safetensors.mlx.load(data)["w"],
    "save": lambda: safetensors.mlx.save(tensors),
    "save_file": lambda: safetensors.mlx.save_file(tensors, "b.safetensors"),
}
seen = {}
for name, way in WAYS.items():
    try:
        seen[name] = str(way().dtype)
    except (TypeError, KeyError, ValueError) as e:
        seen[name] = type(e).__name__
    print(f"{'with' if sys.argv[1:] else 'without'} ml_dtypes, {name}: {seen[name]}")
read = "mlx.core.bfloat16" if sys.argv[1:] else "TypeError"
assert seen == {
    "load_file": read, "safe_open": read, "load": "KeyError",
    "save": "ValueError", "save_file": "ValueError",
}
PYTHON
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'numpy==2.4.6' 'safetensors==0.8.0' 'ml_dtypes==0.6.0'
venv/bin/python look.py
venv/bin/python look.py with
echo "as written: no bfloat16 by way of NumPy"
