#!/usr/bin/env bash
# A function of mx.compile takes f([x], y) for f([x, y]), and computes what it did before.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.compile.
# Guess before: a compiled function gives what the function gives. It is traced anew for
# arguments of another structure, as it is for other shapes, types, numbers and None.
# Seen: the structure is told by where lists and dictionaries begin, not by where they end.
# ([x], y) and ([x, y],) are alike, as are [[x], y] and [[x, y]], and
# {"a": {"b": x}, "c": y} and {"a": {"b": x, "c": y}}. What was called first is what both
# compute. An optional argument of arrays behind a list is enough: f([x], y) and f([x, y]),
# with b=None. Nothing is raised. [[x], [x, y]] and [[x, x], [y]] are told apart.
# Give such a function arrays in one structure, or compile one for each.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

print("mlx", version("mlx"))
x, y = mx.array(2.0), mx.array(3.0)


def optional(a, b=None):
    return a[0] - b if b is not None else a[0] * a[1]


def in_list(a):
    return a[0][0] - a[1] if len(a) == 2 else a[0][0] * a[0][1]


def in_dict(a):
    return a["a"]["b"] - a["c"] if "c" in a else a["a"]["b"] * a["a"]["c"]


MIXED_UP = {
    optional: (([x], y), ([x, y],)),
    in_list: (([[x], y],), ([[x, y]],)),
    in_dict: (({"a": {"b": x}, "c": y},), ({"a": {"b": x, "c": y}},)),
}
for function, calls in MIXED_UP.items():
    assert [function(*call).item() for call in calls] == [-1.0, 6.0]
    first, second = mx.compile(function), mx.compile(lambda *a, f=function: f(*a))
    found = [first(*call).item() for call in calls]
    back = [second(*call).item() for call in reversed(calls)]
    print(f"{function.__name__}: {found}, and in the other order {back}")
    assert found == [-1.0, -1.0]
    assert back == [6.0, 6.0]


def sizes(a):
    return sum(len(part) * part[0] for part in a)


compiled = mx.compile(sizes)
for call in ([[x], [x, y]], [[x, x], [y]]):
    assert compiled(call).item() == sizes(call).item()
compiled = mx.compile(lambda a, b: a * 10 if b is None else a - b)
assert [compiled(x, None).item(), compiled(x, y).item()] == [20.0, -1.0]
PYTHON
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" "$work/look.py"
done
echo "as written: structures are mixed up"
