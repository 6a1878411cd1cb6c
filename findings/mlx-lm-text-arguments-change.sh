#!/usr/bin/env bash
# A required argument of type "string" arrives as another text, or as none.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2, mlx_lm.tool_parsers. The
# model writes its call as its chat template does; the schema says "type": "string".
# Guess before: the argument is what stands between the marks, letter for letter.
# Seen:
#   "null" and "Null" (a name) are null: qwen3_coder, minimax_m2, minicpm5; muse_spark
#   "null".
#   Spaces and ends of lines around the text are cut: glm47, longcat, minimax_m2, minicpm5,
#   muse_spark. "    return x\n" is "return x".
#   "5", "true" and "[1]" are a number, a truth value and a list: muse_spark.
#   kimi_k3, gemma4 and pythonic give each text as it is. 0.31.3 has no minicpm5,
#   muse_spark and kimi_k3.
# A tool that edits files so loses the first line's indentation and the last line's end.
# Tools should take lines as a list, or not depend on both.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import importlib
import sys

old = sys.argv[1] == "0.31.3"
FORMS = {
    "qwen3_coder": "<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>",
    "glm47": "f<arg_key>a</arg_key><arg_value>{}</arg_value>",
    "longcat": "f<longcat_arg_key>a</longcat_arg_key>"
    "<longcat_arg_value>{}</longcat_arg_value>",
    "minimax_m2": '<invoke name="f"><parameter name="a">{}</parameter></invoke>',
    "minicpm5": '"f"><param name="a">{}</param>',
    "muse_spark": '<atem:invoke name="f"><atem:parameter name="a">{}</atem:parameter>'
    "</atem:invoke>",
    "kimi_k3": '<|open|>call tool="f" index="1"<|sep|><|open|>argument key="a"'
    ' type="string"<|sep|>{}<|close|>argument<|sep|><|close|>call<|sep|>',
    "gemma4": 'call:f{{a:<|"|>{}<|"|>}}',
    "pythonic": "[f(a={!r})]",
}
SINCE_0_32 = {"minicpm5", "muse_spark", "kimi_k3"}
CUT = {"    return x\n": "return x", " a ": "a"}
NULL = {"null": None, "Null": None}
CHANGED = {
    "qwen3_coder": NULL,
    "glm47": CUT,
    "longcat": CUT,
    "minimax_m2": NULL | CUT,
    "minicpm5": NULL | CUT,
    "muse_spark": CUT | {"null": None, "5": 5, "true": True, "[1]": [1]},
}
SAID = ["null", "Null", "    return x\n", " a ", "", "5", "true", "[1]", "it's {x}", "a\\nb"]
schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]

for name, form in FORMS.items():
    if old and name in SINCE_0_32:
        continue
    parse = importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call
    changed = {}
    for text in SAID:
        call = parse(form.format(text), tools)
        found = (call[0] if isinstance(call, list) else call)["arguments"]["a"]
        if found != text:
            changed[text] = found
    print(f"{sys.argv[1]} {name}: {changed or 'all as said'}")
    assert changed == CHANGED.get(name, {}), name
PYTHON
python3 -m venv "$work/venv"
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/venv/bin/python" "$work/look.py" "${pair#*/}"
done
echo "as written: texts are changed"
