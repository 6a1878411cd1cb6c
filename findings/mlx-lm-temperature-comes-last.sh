#!/bin/bash
# top_p and min_p look at the probabilities before the temperature; top_k comes after XTC.
#
# Package: mlx-lm 0.31.3 and 0.32.2 (CPU), mlx_lm.sample_utils.make_sampler.
# Guess before: as in transformers and vLLM, whose clients name the same fields: the
# temperature first, then top_k, top_p and min_p.
# Seen: at temperature 5 the likeliest token has 0.27 and not 0.6, and top_p 0.55 would
# keep three of five; only the first is ever drawn. A high temperature with top_p or
# min_p, as recipes for creative writing have it, changes next to nothing here. XTC
# takes the likeliest out before top_k counts them: with top_k 2 it leaves two of the
# unlikely ones. (llama.cpp has the temperature last, too, and top_k first.)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/program.py" <<'PYTHON'
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

PROBABILITIES = mx.array([[0.6, 0.2, 0.1, 0.06, 0.04]])


def drawn(**options):
    sampler, logprobs = make_sampler(**options), mx.log(PROBABILITIES)
    mx.random.seed(0)
    found = sorted({sampler(logprobs).item() for _ in range(500)})
    print(f"mlx {mx.__version__}, {options}: tokens {found}")
    return found


warm = mx.softmax(mx.log(PROBABILITIES) / 5)[0].tolist()
assert sum(warm[:2]) < 0.55 < sum(warm[:3])  # temperature first: three tokens
assert drawn(temp=5.0) == [0, 1, 2, 3, 4]
assert drawn(temp=5.0, top_p=0.55) == [0]
assert min(warm) > 0.5 * max(warm)  # temperature first: all five
assert drawn(temp=5.0, min_p=0.5) == [0]
assert drawn(temp=1.0, top_k=2) == [0, 1]
xtc = {"xtc_probability": 1.0, "xtc_threshold": 0.05}
assert drawn(temp=1.0, **xtc) == [3, 4]
assert drawn(temp=1.0, top_k=2, **xtc) == [3, 4]
PYTHON
for versions in 'mlx[cpu]==0.31.2 mlx-lm==0.31.3' 'mlx[cpu]==0.32.4 mlx-lm==0.32.2'; do
  python3 -m venv --clear "$directory/venv"
  # shellcheck disable=SC2086
  "$directory/venv/bin/pip" install --quiet --disable-pip-version-check $versions
  "$directory/venv/bin/python" "$directory/program.py"
done
