#!/usr/bin/env bash
# FunctionGemma's calls lose arguments that are lists or objects.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2,
# mlx_lm.tool_parsers.function_gemma.
# Guess before: an argument that is a list or an object is one, in the model's own notation:
# [1,2], {k:<escape>v<escape>}. gemma4's parser reads its kin.
# Seen: a list raises ValueError "substring not found". An object, {n:1}, is the text "{n:1",
# without a word, and what comes behind it is lost. A "}" in a text raises ValueError.
# mlx_lm.server then has no call. Tools for this model take texts, numbers and truth values.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys

from mlx_lm.tool_parsers import function_gemma, gemma4

SAID = {
    "call:f{a:1,b:<escape>x,y:z<escape>,c:true}": {"a": 1, "b": "x,y:z", "c": True},
    "call:f{a:[1,2]}": "substring not found",
    "call:f{a:[<escape>x<escape>,<escape>y<escape>]}": "substring not found",
    "call:f{a:{n:1},b:2}": {"a": "{n:1"},
    "call:f{a:<escape>{x}<escape>}": "substring not found",
}
for text, seen in SAID.items():
    try:
        found = function_gemma.parse_tool_call(text)["arguments"]
    except ValueError as e:
        found = str(e)
    print(f"mlx-lm {sys.argv[1]}: {text} is {found!r}")
    assert found == seen
kin = gemma4.parse_tool_call('call:f{a:[1,2],b:{n:<|"|>{x}<|"|>}}')["arguments"]
assert kin == {"a": [1, 2], "b": {"n": "{x}"}}
PYTHON
python3 -m venv "$work/venv"
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/venv/bin/python" "$work/look.py" "${pair#*/}"
done
echo "as written: lists and objects are lost"
