"""Stock, restarted, protected, others: one load, one set of faults, what clients saw.

``make scoreboard [SEED=N] [REQUESTS=n] [ROUNDS=n] [SERVERS="stock mlx-safe"]
[RATES="0 5"]`` measures into ``build/scoreboard.json``, and draws docs/benchmarks.md.

In each round the servers go through one script one after another (`scoreboard_load`).
First undisturbed, which is what their answers are held against. Then with so many
faults per hundred requests, and on a GPU of two thirds of the memory that the script
wants of the first of them. What it wants depends on which prompts were read together:
35 to 103 MB in four runs of one script. ``--ceiling`` gives a GPU of that size.
A fault is planned when its request is
sent, and strikes one of the next eleven steps, of any request. Every run has a
process of its own. The file is written after each of them, so a run that was ended is
not lost; ``--append`` adds rounds to it.

With ``--card``, for MLX's CUDA backend, the model is larger, the errors are CUDA's, one
in five loses the card, and our servers are supervised. `gpu.py oom` has a real ceiling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "servers")]

from scoreboard_load import Result, Script, go, learn, make_script, plan_faults  # noqa: E402
from scoreboard_servers import Contestant, Running, chosen, running  # noqa: E402

from support.models import make_model  # noqa: E402

OUT = ROOT / "build" / "scoreboard.json"
ENDLESS = 2**50
CEILING_SHARE = 2 / 3
SETTLE_S = 0.3
# Width and layers; a card needs some to be a card's.
SIZES_ON_A_CARD = ("1024", "12")


def measure(
    server: Running, script: Script, model: Path, texts: dict[int, str]
) -> dict[str, Any]:
    """One run of the script; the row of the data file."""
    began = server.cpu_s()
    result = go(script, server.port, str(model), texts, server.plan)
    time.sleep(SETTLE_S)
    return {
        "seconds": round(result.ended - result.began, 3),
        "cpu_s": round(server.cpu_s() - began, 2),
        "tokens": sum(seen.tokens for seen in result.seen),
        "starts": server.starts,
        "recovery_ms": recoveries(result, server.fired()),
        "load_average": os.getloadavg()[0],
        "requests": [
            {
                "number": seen.number,
                "kind": seen.kind,
                "outcome": seen.outcome,
                "told": "" if seen.outcome == "right" else seen.told[:80],
                "tries": seen.tries,
                "first_ms": milliseconds(seen.first - seen.sent),
                "end_ms": milliseconds(seen.end - seen.sent),
            }
            for seen in sorted(result.seen, key=lambda seen: seen.number)
        ],
    }


def milliseconds(seconds: float) -> int:
    return max(0, round(1e3 * seconds))


def recoveries(result: Result, fired: list[float]) -> list[int | None]:
    """From each fault to the first byte of the next right answer asked for after it.

    None: there was none any more, though requests were sent.
    """
    right = [s for s in result.seen if s.outcome == "right"]
    found: list[int | None] = []
    for when in fired:
        if not any(s.sent > when for s in result.seen):
            continue  # it struck at the end
        firsts = [s.first for s in right if s.asked > when]
        found.append(milliseconds(min(firsts) - when) if firsts else None)
    return found


class Round:
    """One script, all servers."""

    def __init__(
        self,
        contestants: list[Contestant],
        model: Path,
        work: Path,
        seed: int,
        size: int,
        card: bool,
    ) -> None:
        self._contestants, self._model, self._work = contestants, model, work
        self._card = card
        self._seed, self._script = seed, make_script(seed, size)
        self._texts: dict[str, dict[int, str]] = {}
        self._runs = 0

    def _directory(self) -> Path:
        self._runs += 1
        return self._work / str(self._runs)

    def references(self) -> dict[str, Any]:
        """What each says undisturbed; by name: how many texts, and what it refused."""
        found: dict[str, Any] = {}
        first: dict[int, str] = {}
        for contestant in self._contestants:
            with running(contestant, self._model, self._directory()) as server:
                texts, refused = learn(self._script, server.port, str(self._model))
            self._texts[contestant.name] = texts
            first = first or texts
            same = sum(first.get(n, "").strip() == t.strip() for n, t in texts.items())
            found[contestant.name] = {
                "texts": len(texts),
                "refused": refused,
                "as_the_first": same,
            }
            print(f"{contestant.name}: {found[contestant.name]}", flush=True)
        return found

    def at(self, rate: float) -> Iterator[dict[str, Any]]:
        planned = plan_faults(self._script, self._seed, rate, self._card)
        for contestant in self._mixed(rate):
            with running(contestant, self._model, self._directory()) as server:
                row = self._row(contestant, server)
                row.update(rate=rate, planned=planned, fired=len(server.fired()))
            yield row

    def under_a_ceiling(self, ceiling: int | None) -> Iterator[dict[str, Any]]:
        """Args: ceiling: bytes; None: a share of what the load wants of the first."""
        plan_faults(self._script, self._seed, 0)
        wanted = None
        if ceiling is None:
            wanted = self._wanted()
            ceiling = int(CEILING_SHARE * wanted)
        for contestant in self._mixed("ceiling"):
            work = self._directory()
            with running(contestant, self._model, work, ceiling) as server:
                row = self._row(contestant, server)
                peak, struck = server.memory()
                row.update(ceiling=ceiling, wanted=wanted, peak=peak, struck=struck)
            yield row

    def _wanted(self) -> int:
        """The most bytes that a step of the first took, with no ceiling."""
        first = self._contestants[0]
        with running(first, self._model, self._directory(), ENDLESS) as server:
            self._row(first, server)
            wanted, _ = server.memory()
        print(f"the load wants {wanted / 1e6:.2f} MB of {first.name}")
        return wanted

    def _mixed(self, salt: object) -> list[Contestant]:
        """In an order of its own, so that a drift of the machine hits nobody more."""
        found = list(self._contestants)
        random.Random(f"{self._seed} {salt}").shuffle(found)
        return found

    def _row(self, contestant: Contestant, server: Running) -> dict[str, Any]:
        texts = self._texts[contestant.name]
        row = measure(server, self._script, self._model, texts)
        return {"server": contestant.name, "seed": self._seed, **row}


def say(row: dict[str, Any]) -> None:
    outcomes: dict[str, int] = {}
    for request in row["requests"]:
        outcomes[request["outcome"]] = outcomes.get(request["outcome"], 0) + 1
    under = f"{row['rate']} per 100" if "rate" in row else "ceiling"
    print(
        f"{under:12} {row['server']:18} {outcomes}, {row['seconds']:.1f} s, "
        f"{row['tokens'] / row['seconds']:.0f} tokens/s, "
        f"load {row['load_average']:.1f}",
        flush=True,
    )


def has_card() -> bool:
    import mlx.core as mx

    return "free_memory" in mx.device_info()


def about(contestants: list[Contestant], card: bool) -> dict[str, Any]:
    from importlib.metadata import version

    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if card:
        import mlx.core as mx

        machine += f", {mx.device_info()['device_name']}"
    sizes = " of {} numbers and {} layers".format(*SIZES_ON_A_CARD) if card else ""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-safe")},
        "model": f"a random qwen3{sizes}, tests/servers/tiny_qwen3.py",
        "command": "make scoreboard" + " SCOREBOARD_ARGS=--card" * card,
        "card": card,
        "titles": {c.name: c.title for c in contestants},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    fresh = random.SystemRandom().randrange(2**32)
    parser.add_argument("--seed", type=int, default=fresh)
    parser.add_argument(
        "--requests", type=int, default=120, help="of each run, at least"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--rates", nargs="*", type=float, default=[0, 1, 5])
    parser.add_argument("--no-ceiling", action="store_true")
    parser.add_argument("--card", action="store_true", help="MLX's CUDA backend")
    parser.add_argument("--ceiling", type=int, metavar="BYTES", help="the GPU's size")
    parser.add_argument("--append", action="store_true", help="to what is in the file")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    if min(asked.requests, asked.rounds) < 1:
        parser.error("--requests and --rounds must be over 0")
    if asked.ceiling is not None and asked.ceiling < 1:
        parser.error("--ceiling must be over 0")
    if not all(0 <= rate <= 100 for rate in asked.rates):
        parser.error("--rates are faults per hundred requests, from 0 to 100")
    if asked.card and not has_card():
        parser.error("--card: MLX computes on no CUDA card here")
    contestants = chosen(asked.servers, asked.card)
    data: dict[str, Any] = {"about": about(contestants, asked.card), "rounds": []}
    if asked.append and asked.out.exists():
        data = json.loads(asked.out.read_text())
    print(f"seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="scoreboard") as directory:
        sizes = SIZES_ON_A_CARD if asked.card else ()
        made = Path(directory) / "model"
        model = make_model("../servers/tiny_qwen3.py", made, *sizes)
        for number in range(asked.rounds):
            work = Path(directory) / f"round-{number}"
            seed = asked.seed + number
            one = Round(contestants, model, work, seed, asked.requests, asked.card)
            found = {"seed": seed, "requests": asked.requests, "runs": []}
            data["rounds"].append(found)
            found["references"] = one.references()
            rows = itertools.chain(
                *(one.at(rate) for rate in asked.rates),
                ()
                if asked.no_ceiling or asked.card
                else one.under_a_ceiling(asked.ceiling),
            )
            for row in rows:
                found["runs"].append(row)
                say(row)
                write(asked.out, data)


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


if __name__ == "__main__":
    main()
