#!/bin/bash
# Weights that are loaded and saved under the same name, one of them changed, are lost.
#
# Package: mlx 0.31.2 and 0.32.4 (CPU), mx.load and mx.save_safetensors.
# Guess before: what mx.load has returned is there; the file has what was saved.
# Seen: mx.load reads the head of the file, and the numbers when an array is first
# needed. 0.31.2 empties the file before it needs them: the saved "kept" has other
# numbers, and nothing is raised. 0.32.4 saves what was loaded.
# Both read the numbers late: an array has those that the file had when it was
# evaluated, not when it was loaded. A server that lets a file be replaced while it
# loads should evaluate at once, and who changes weights should save under a new name.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/program.py" <<'PYTHON'
import mlx.core as mx

FILE = "weights.safetensors"
TEN = [float(n) for n in range(10)]


def save(numbers):
    mx.save_safetensors(FILE, {"kept": mx.array(numbers), "changed": mx.zeros(10)})


save(TEN)
weights = mx.load(FILE)
save([n + 100 for n in TEN])
late = weights["kept"].tolist()
print(f"mlx {mx.__version__}: loaded before the file was replaced: {late[:3]}")
assert late == [n + 100 for n in TEN]

save(TEN)
weights = mx.load(FILE)
weights["changed"] = mx.ones(10)
mx.save_safetensors(FILE, weights)
found = mx.load(FILE)
assert found["changed"].tolist() == [1.0] * 10
same = found["kept"].tolist() == TEN
print(f"mlx {mx.__version__}: saved under the same name, the same: {same}")
assert same == (mx.__version__ != "0.31.2")
PYTHON
for version in 0.31.2 0.32.4; do
  python3 -m venv --clear "$directory/venv"
  "$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version"
  (cd "$directory" && "$directory/venv/bin/python" program.py)
done
