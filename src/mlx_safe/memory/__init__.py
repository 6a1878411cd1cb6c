"""What fits: ceilings, use, estimates, and the decision about one request.

| Module | What is in it |
|---|---|
| `sizes` | "20G" and back |
| `machine` | what the machine and MLX say about memory |
| `ceiling` | how much may be active, and where that number comes from |
| `context` | the tokens that a model was made for |
| `estimate` | what a request will need: caches, and one step's transient |
| `budget` | fits, fits if …, wait, or refuse: a pure function |
| `demand` | what a batch of requests takes, and how long they may be |
| `sizing` | from a ceiling and a model to limits and recommended flags |

Imports MLX only where it measures, and neither mlx-lm nor a web framework. All
sizes are bytes.
"""
