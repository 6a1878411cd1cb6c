#!/usr/bin/env bash
# Optional arguments of tool calls change their type, in each parser in another way.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2, mlx_lm.tool_parsers.
# The parameter is optional, written {"anyOf": [{"type": T}, {"type": "null"}]} (what
# pydantic makes of Optional[T]) or {"type": [T, "null"]}; the model calls as it should.
# Guess before: an argument has the type of its schema, which the parsers are given for
# that: Optional[str] 12345 is "12345", Optional[int] 5 is 5, Optional[bool] true is True.
# Seen (without "null" all are right):
#   glm47, longcat: Optional[str] 12345 is the number 12345, in both spellings.
#   qwen3_coder, anyOf: all are strings: "12345", "5", "true".
#   qwen3_coder, list: the number 12345, 5; "true" is a string (0.31.3: ValueError).
#   minimax_m2 0.32.2: all right. 0.31.3: all are null, the text too, without a word.
# Who writes tools for such a server makes a parameter optional by leaving it out of
# "required", and gives it one type. A client that validates arguments has to coerce
# them first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'PYTHON'
import importlib
import sys

FORMS = {
    "qwen3_coder": "<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>",
    "glm47": "f<arg_key>a</arg_key><arg_value>{}</arg_value>",
    "longcat": "f<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>{}</longcat_arg_value>",
    "minimax_m2": '<invoke name="f"><parameter name="a">{}</parameter></invoke>',
}
WRITTEN = {"string": "12345", "integer": "5", "boolean": "true"}


def read(name, schema, text):
    parameters = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call
    try:
        return parser(FORMS[name].format(text), tools)["arguments"]["a"]
    except ValueError:
        return ValueError


old = sys.argv[1] == "0.31.3"
right = ["12345", 5, True]
expected = {
    "qwen3_coder": (["12345", "5", "true"], [12345, 5, ValueError if old else "true"]),
    "glm47": ([12345, 5, True], [12345, 5, True]),
    "longcat": ([12345, 5, True], [12345, 5, True]),
    "minimax_m2": ([None] * 3, [None] * 3) if old else (right, right),
}
for name, seen in expected.items():
    plain = [read(name, {"type": t}, text) for t, text in WRITTEN.items()]
    any_of = [
        read(name, {"anyOf": [{"type": t}, {"type": "null"}]}, text)
        for t, text in WRITTEN.items()
    ]
    listed = [read(name, {"type": [t, "null"]}, text) for t, text in WRITTEN.items()]
    print(f"{sys.argv[1]} {name}: plain {plain}, anyOf {any_of}, list {listed}")
    assert repr(plain) == repr(right), name
    assert repr((any_of, listed)) == repr(seen), name
PYTHON

python3 -m venv "$work/venv"
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/venv/bin/python" "$work/look.py" "${pair#*/}"
done
