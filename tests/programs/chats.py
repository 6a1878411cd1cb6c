"""A user's program, which knows nothing of mlx-safe."""

import sys

from mlx_lm import load, stream_generate

model, tokenizer = load(sys.argv[1])
said = 0
try:
    for _ in stream_generate(model, tokenizer, [5, 6, 7, 8], max_tokens=6):
        said += 1
except RuntimeError as e:
    print("failed after", said, e)
else:
    print("said", said)
