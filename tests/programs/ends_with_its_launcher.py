"""Before a rank of mlx.launch: rank 1 meets an exception that reaches terminate.

It ends when the launcher does, so that no test leaves anything behind.
"""

import os
import sys
import threading

threading.Thread(
    target=lambda: os._exit(1 if sys.stdin.read() else 2), daemon=True
).start()
if os.environ["MLX_RANK"] == "1":
    os.environ["MLX_SAFE_INJECT"] = "decode:3:8:once:terminate"
