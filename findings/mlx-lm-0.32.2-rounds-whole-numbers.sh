#!/usr/bin/env bash
# A tool call's integer above 2^53 arrives as another one.
#
# Package: mlx-lm 0.32.2 (with mlx 0.32.4), mlx_lm.tool_parsers.qwen3_coder; 0.31.3 is
# exact.
# Guess before: a parameter of "type": "integer" is read by int(), and is exact.
# Seen: 1234567890123456789 arrives as 1234567890123456768, without an error. 0.32.2 reads
# a float first, so that "5.0" is the integer 5, and makes an int of that. Ids of Discord
# and X are of that size: a tool deletes the wrong message.
# minimax_m2, glm47 and the parsers of JSON are exact in both.
# Who writes a tool for such a server should declare ids as strings.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'

"$work/venv/bin/python" - <<'PYTHON'
from mlx_lm.tool_parsers import glm47, json_tools, minimax_m2, qwen3_coder

ID = 1234567890123456789


def tools(kind):
    parameters = {"type": "object", "properties": {"id": {"type": kind}}}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def qwen(text, kind="integer"):
    call = f"<function=f>\n<parameter=id>\n{text}\n</parameter>\n</function>"
    return qwen3_coder.parse_tool_call(call, tools(kind))["arguments"]["id"]


others = {
    glm47: f"f<arg_key>id</arg_key><arg_value>{ID}</arg_value>",
    json_tools: f'{{"name": "f", "arguments": {{"id": {ID}}}}}',
    minimax_m2: f'<invoke name="f"><parameter name="id">{ID}</parameter></invoke>',
}
for parser, text in others.items():
    assert parser.parse_tool_call(text, tools("integer"))["arguments"]["id"] == ID
print("written:    ", ID)
print("qwen3_coder:", qwen(ID))
assert qwen(5) == 5 and qwen("5.0") == 5
assert qwen(ID) == int(float(ID)) != ID
assert qwen(ID, "string") == str(ID)
PYTHON
