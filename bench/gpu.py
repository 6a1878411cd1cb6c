"""What a real GPU shows: one job a call, each within minutes; tables, and JSON in $OUT.

    bench/gpu.py oom         a real out of memory: another process holds the card
    bench/gpu.py churn       the same, coming and going under load
    bench/gpu.py recovery    a fault to the next token, beside reading the prompt
    bench/gpu.py sticky      a sticky error, by its text, to every client's last word
    bench/gpu.py throughput  tokens/s, protected : stock, in pairs, with the interval
    bench/gpu.py cpu         a tiny model: CPU per token and tokens/s, in pairs
    bench/gpu.py kv          KV caches on disk: out of memory and kill -9, on and off
    bench/gpu.py kv-speed    the same: reading and tokens/s, on : off, in pairs
    bench/gpu.py ranks       two ranks (two cards with NCCL): served, killed, supervised

`oom` and `churn` need a card whose free memory MLX can tell (CUDA). The others run
anywhere, so that they can be tried: with ``--hidden 64 --layers 2`` on a CPU, `ranks`
with ``--backend ring --hidden 256 --layers 2``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_faults
import gpu_kv
import gpu_memory
import gpu_ranks
import gpu_speed
from gpu_support import kv_heads_of, make_model, write_json

JOBS = {
    "oom": gpu_memory.out_of_memory,
    "churn": gpu_memory.churn,
    "recovery": gpu_faults.recovery,
    "sticky": gpu_faults.sticky,
    "throughput": gpu_speed.throughput,
    "cpu": gpu_speed.cpu,
    "kv": gpu_kv.lives,
    "kv-speed": gpu_kv.speed,
    "ranks": gpu_ranks.ranks,
}
NEED_A_CARD = ("oom", "churn")
# What --only takes.
PARTS = {"oom": list(gpu_memory.SERVERS), "ranks": ["probe", *gpu_ranks.PARTS]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    add = parser.add_argument
    add("--seconds", type=float, default=300.0, help="the job ends about then")
    add("--leave", type=float, default=6.0, help="GiB of the card that are left")
    add("--clients", type=int, nargs="+")
    add("--words", type=int, nargs="+", help="tokens of a prompt")
    add("--tokens", type=int, help="of an answer")
    add("--pairs", type=int, default=30)
    add("--rounds", type=int, default=4)
    add("--only", nargs="+", help="oom: these servers; ranks: these parts")
    add("--backend", choices=("nccl", "ring"), default="nccl", help="of ranks")
    add("--hidden", type=int, default=1024)
    add("--layers", type=int, default=28)
    add("--kv-heads", type=int, help="each of 64; default: half of the heads")
    args = parser.parse_args()
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and one <= 0:
                parser.error(f"--{name.replace('_', '-')} must be over 0, not {one:g}")
    heads, rest = divmod(args.hidden, 64)
    kv_heads = args.kv_heads or kv_heads_of(args.hidden)
    if rest or heads % kv_heads:
        parser.error("--hidden must be 64 for each head, and --kv-heads divide them")
    if args.job == "ranks" and kv_heads % 2:
        parser.error("two ranks share the heads: --hidden 256, and --kv-heads even")
    parts = PARTS.get(args.job, ())
    for name in args.only or ():
        if name not in parts:
            known = ", ".join(parts) or "none"
            parser.error(f"--only: {args.job} has no {name!r}; there are {known}")
    return args


def main() -> None:
    args = parse()
    import mlx.core as mx

    info = mx.device_info()
    if "free_memory" not in info:
        none = f"bench/gpu.py {args.job}: MLX computes on no CUDA card here"
        if args.job in NEED_A_CARD:
            sys.exit(none)
        if args.job == "ranks" and args.backend == "nccl":
            sys.exit(f"{none}: --backend ring needs none")
    card = info.get("device_name") or info.get("architecture")
    print(f"{card}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(
            Path(directory) / "model", args.hidden, args.layers, args.kv_heads
        )
        mx.clear_cache()
        rows = JOBS[args.job](args, model)
    write_json(args.job, {"card": card, "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
