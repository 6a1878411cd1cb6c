#!/usr/bin/env bash
# mlx-lm 0.31.3 with mlx 0.31.2, and mlx-lm 0.32.2 with mlx 0.32.4: mlx_lm.server.
#
# Guess: a server started with --adapter-path serves with that adapter, and a request
# with "adapters" is answered with the adapter that it names, with "model" or without.
#
# Seen, of what the server asks its loader for (model, adapter, draft model):
#   0.31.3: --adapter-path is never loaded ('m', None, None); "adapters" is.
#   0.32.2: --adapter-path is loaded; "adapters" of a request without "model" is not,
#           and the answer is a 200 of another model than the one asked for.
#
# Exits with 1 if either has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

look() { # MLX MLX_LM EXPECTED
  python3 -m venv "$work/$2"
  "$work/$2/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$1" "mlx-lm==$2"
  "$work/$2/bin/python" - "$3" <<'EOF'
import sys
from types import SimpleNamespace

from mlx_lm import server

flags = dict(
    model="m", draft_model=None, pipeline=False, trust_remote_code=False,
    chat_template="", use_default_chat_template=False,
)


def asked(adapter_path, *request):
    provider = server.ModelProvider(SimpleNamespace(adapter_path=adapter_path, **flags))
    asked = []
    provider._load = lambda *key: asked.append(key)  # instead of reading weights
    provider.load(*request) if request else provider.load_default()
    return asked[0]


# What the handler passes on for {"adapters": "a"}: model and draft have its defaults.
found = repr([asked("a"), asked(None, "default_model", "a", "default_model")])
print(server.__version__, found)
sys.exit(found != sys.argv[1])
EOF
}

look 0.31.2 0.31.3 "[('m', None, None), ('m', 'a', None)]"
look 0.32.4 0.32.2 "[('m', 'a', None), ('m', None, None)]"
