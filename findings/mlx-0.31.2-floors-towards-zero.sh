#!/usr/bin/env bash
# In mlx 0.31.2 -7 // 2 is -3 for integers, and -4.0 for floats.
#
# Package: mlx 0.31.2 and 0.32.4 (CPU), `//`, `%` and mx.divmod.
# Guess before: `//` is mx.floor_divide and rounds down, for each type, as in Python and NumPy:
# -4. With the remainder, 1, it makes the number again: -4 * 2 + 1.
# Seen: 0.32.4 is right. In 0.31.2 integers are rounded towards zero, -3, but the remainder is
# 1, so together they make -5. mx.divmod gives -3 and -1, for floats too, where `//` gives
# -4.0. And -7 % -2 is -1 in float32 and 1 in float16 and bfloat16.
# Who takes a negative offset apart into blocks gets another block with another version.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx

assert version("mlx") == sys.argv[1]
old = sys.argv[1] == "0.31.2"
INTEGERS = (mx.int8, mx.int32, mx.int64)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
for dtype in INTEGERS + FLOATS:
    a, b = mx.array(-7, dtype), mx.array(2, dtype)
    quotient, rest = (a // b).item(), (a % b).item()
    both = [x.item() for x in mx.divmod(a, b)]
    negative = (a % -b).item()
    print(f"mlx {sys.argv[1]} {dtype}: -7 // 2 is {quotient}, % {rest}, divmod {both};"
          f" -7 % -2 is {negative}")
    assert quotient == (-3 if old and dtype in INTEGERS else -4)
    assert rest == 1
    assert both == ([-3, -1] if old else [-4, 1])
    assert negative == (1 if old and dtype in (mx.float16, mx.bfloat16) else -1)
PYTHON
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" "$work/look.py" "$version"
done
echo "as written: 0.31.2 rounds integers towards zero"
