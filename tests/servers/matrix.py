"""The table of docs/integrations.md, of what ``make test-servers`` has seen.

Run as a program: ``python tests/servers/matrix.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from peers import MODES, PEERS, ROOT

COLUMNS = ("prefill", "decode", "prefill, stream", "decode, stream")
MORE = ("three at once", "lasting", "next", "it ends", "status")


def table() -> str:
    columns = (*COLUMNS, *MORE)
    lines = [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for peer in PEERS:
        for mode in MODES:
            file = ROOT / "build" / "servers" / f"{peer.name}.{mode}.json"
            if file.exists():
                cells = json.loads(file.read_text())["cells"]
                row = " | ".join(cells.get(column, "") for column in columns)
                lines.append(f"| {peer.name}, {mode} | {row} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
