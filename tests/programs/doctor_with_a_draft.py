"""MODEL DRAFT: whether the doctor finds more of everything with the draft model."""

import sys

from mlx_safe.doctor import examine

alone = examine(sys.argv[1])["model"]
both = examine(sys.argv[1], draft=sys.argv[2])["model"]
for name in ("bytes", "bytes_per_token"):
    print(both[name] > alone[name])
print(both["flags"][:2])
