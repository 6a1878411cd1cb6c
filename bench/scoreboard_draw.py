"""The table and the plots of docs/benchmarks.md, of what `scoreboard.py` measured.

``.venvs/scoreboard/bin/python bench/scoreboard_draw.py [FILE]`` writes them to
build/scoreboard; ``--publish`` to docs/, with a copy of the data beside the plots. What
``scoreboard.py --card`` measured has its own place in docs/. ``--table`` prints the
table only, which needs no matplotlib.

Intervals are 95 %: of shares by Wilson's score; of percentiles and of ratios by
bootstrap over requests; of rates by bootstrap over rounds, where there are several.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "scoreboard.json"
DOCS = ROOT / "docs" / "benchmarks"
TRIED = ROOT / "build" / "scoreboard"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- {}: bench/scoreboard_draw.py -->"
END = "<!-- {} ends -->"
SAMPLES = 1000
TIMES = (0.05, 30.0)  # s, of the plot
TITLES = {
    "stock": "mlx_lm.server",
    "supervised": "mlx_lm.server, restarted",
    "mlx-safe": "mlx-safe serve",
    "mlx-safe-kv": "mlx-safe serve --kv-dir",
    "vllm-mlx-batched": "vllm-mlx --continuous-batching",
    "rapid-mlx": "rapid-mlx",
    "mlx-vlm": "mlx-vlm",
    "mtplx": "mtplx",
}
# "lost" holds those that hung as well.
OUTCOMES = ("right", "wrong", "cut", "lost")
COLOURS = {"right": "#4c9f70", "wrong": "#b3312c", "cut": "#e08e36", "lost": "#7a7f87"}


class Cell:
    """All runs of one server under one condition.

    Args:
        rows: of the data file, one for each round.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        requests = [q for row in rows for q in row["requests"]]
        self.asked = [q for q in requests if q["kind"] != "leave"]
        self.right = [q for q in self.asked if q["outcome"] == "right"]

    def count(self, outcome: str) -> int:
        same = ("lost", "hang") if outcome == "lost" else (outcome,)
        return sum(q["outcome"] in same for q in self.asked)

    @property
    def hangs(self) -> int:
        return sum(q["outcome"] == "hang" for q in self.asked)

    @property
    def again(self) -> int:
        """Requests that were sent more than once."""
        return sum(q["tries"] > 1 for q in self.asked)

    def times(self, which: str) -> list[int]:
        return [q[f"{which}_ms"] for q in self.right]

    def total(self, name: str) -> float:
        return float(sum(row.get(name, 0) for row in self.rows))

    def per(self, over: str, under: str, factor: float = 1.0) -> str:
        """A ratio of two sums, with its interval where there are several rounds."""

        def value(rows: Sequence[dict[str, Any]]) -> float:
            below = sum(row[under] for row in rows)
            return factor * sum(row[over] for row in rows) / below if below else 0.0

        whole = figure(value(self.rows))
        if len(self.rows) < 2:
            return whole
        low, high = bootstrap(self.rows, value)
        return f"{whole} ({figure(low)} to {figure(high)})"


def cells_of(data: dict[str, Any]) -> dict[tuple[str, str], Cell]:
    """By server and condition: "0", "1", "5", "ceiling"."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in data["rounds"]:
        for row in one["runs"]:
            condition = f"{row['rate']:g}" if "rate" in row else "ceiling"
            rows.setdefault((row["server"], condition), []).append(row)
    return {key: Cell(found) for key, found in rows.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def bootstrap(
    values: Sequence[Any], what: Callable[[Sequence[Any]], float]
) -> tuple[float, float]:
    draw = random.Random(0)
    found = [what(draw.choices(values, k=len(values))) for _ in range(SAMPLES)]
    return percentile(found, 0.025), percentile(found, 0.975)


def wilson(count: int, of: int) -> tuple[float, float]:
    """The interval of a share, right where none was seen as well."""
    z, p = 1.96, count / of
    middle = p + z * z / (2 * of)
    half = z * ((p * (1 - p) + z * z / (4 * of)) / of) ** 0.5
    below = 1 + z * z / of
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def seconds(values: Sequence[int]) -> str:
    """Median, p95, p99, the last with its interval."""
    if not values:
        return "-"
    p50, p95, p99 = (percentile(values, share) / 1e3 for share in (0.5, 0.95, 0.99))
    low, high = bootstrap(values, lambda x: percentile(x, 0.99) / 1e3)
    return f"{p50:.2f}, {p95:.2f}, {p99:.2f} ({low:.2f} to {high:.2f})"


def recovery(cell: Cell) -> str:
    found = [ms for row in cell.rows for ms in row["recovery_ms"]]
    if not found:
        return "-"
    times = [ms for ms in found if ms is not None]
    never = len(found) - len(times)
    said = (
        f"{statistics.median(times) / 1e3:.2f}, {max(times) / 1e3:.2f}" if times else ""
    )
    late = f"never: {never} of {len(found)}" if never else ""
    return "; ".join(filter(None, (said, late)))


HEAD = (
    "asked",
    "lost",
    "wrong",
    "cut, looks whole",
    "hang",
    "tried again",
    "first byte, s: p50, p95, p99",
    "end, s: p50, p95, p99",
    "tokens/s",
    "CPU ms/token",
    "load average",
    "recovery, s: median, longest",
)


def line(cell: Cell) -> list[str]:
    low, high = wilson(cell.count("lost"), len(cell.asked))
    return [
        str(len(cell.asked)),
        f"{cell.count('lost')} ({100 * low:.1f} to {100 * high:.1f} %)",
        str(cell.count("wrong")),
        str(cell.count("cut")),
        str(cell.hangs),
        str(cell.again),
        seconds(cell.times("first")),
        seconds(cell.times("end")),
        cell.per("tokens", "seconds"),
        cell.per("cpu_s", "tokens", 1e3),
        ", ".join(f"{row['load_average']:.1f}" for row in cell.rows),
        recovery(cell),
    ]


def titles(cells: dict[tuple[str, str], Cell]) -> dict[str, str]:
    names = {name for name, _ in cells}
    return {name: title for name, title in TITLES.items() if name in names}


def tables(data: dict[str, Any]) -> str:
    cells = cells_of(data)
    parts = []
    for condition in sorted({c for _, c in cells}):
        head = list(HEAD)
        rows = {
            n: cells[n, condition] for n in titles(cells) if (n, condition) in cells
        }
        if condition == "ceiling":
            first = next(iter(rows.values())).rows
            mb = ", ".join(f"{row['ceiling'] / 1e6:.1f}" for row in first)
            title = f"No faults, a GPU of two thirds of what the load wants ({mb} MB)"
            if first[0]["wanted"] is None:  # --ceiling
                title = f"No faults, a GPU of {mb} MB"
            head[-1] = "peak / ceiling"
            head.append("steps out of memory")
        else:
            fired = [int(cell.total("fired")) for cell in rows.values()]
            between = f"{min(fired)} to {max(fired)} struck"
            faults = "fault" if condition == "1" else "faults"
            title = f"{condition} {faults} per hundred requests" + (
                f" ({between} of {int(next(iter(rows.values())).total('planned'))})"
                if condition != "0"
                else ""
            )
        parts += [f"### {title}", ""]
        parts += [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
        for name, cell in rows.items():
            found = line(cell)
            if condition == "ceiling":
                peak = max(row["peak"] / row["ceiling"] for row in cell.rows)
                found[-1:] = [f"{peak:.2f}", str(int(cell.total("struck")))]
            parts.append(f"| {TITLES[name]} | {' | '.join(found)} |")
        parts.append("")
    return "\n".join([*parts, *against(cells)])


def against(cells: dict[tuple[str, str], Cell]) -> list[str]:
    """What is aimed at, and what came."""
    found = []
    for name in ("mlx-safe", "mlx-safe-kv"):
        calm, struck = cells.get((name, "0")), cells.get((name, "5"))
        if calm is None or struck is None:
            continue
        a, b = calm.times("end"), struck.times("end")
        ratio = percentile(b, 0.99) / percentile(a, 0.99)
        draw = random.Random(1)
        ratios = [
            percentile(draw.choices(b, k=len(b)), 0.99)
            / percentile(draw.choices(a, k=len(a)), 0.99)
            for _ in range(SAMPLES)
        ]
        low, high = percentile(ratios, 0.025), percentile(ratios, 0.975)
        found.append(
            f"- {TITLES[name]}: p99 of the time to the end at 5 per hundred over that "
            f"without faults: {ratio:.2f} ({low:.2f} to {high:.2f}); aim: at most 1.3."
        )
    ours = cells.get(("mlx-safe", "0"))
    for name in titles(cells):
        other = cells.get((name, "0"))
        if ours is None or other is None or name.startswith("mlx-safe"):
            continue
        rates = [
            (x["tokens"] / x["seconds"]) / max(1e-9, y["tokens"] / y["seconds"])
            for x, y in zip(ours.rows, other.rows, strict=False)
        ]
        found.append(
            f"- Tokens/s without faults, mlx-safe serve over {TITLES[name]}: "
            f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}, "
            f"{len(rates)} rounds)."
        )
    return found


# -- plots --------------------------------------------------------------------------


def draw(data: dict[str, Any], directory: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    # The same data gives the same file; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "scoreboard", "svg.fonttype": "none"})
    cells = cells_of(data)
    draw_outcomes(cells, directory / "outcomes.svg")
    draw_times(cells, directory / "times.svg")
    draw_speed(cells, directory / "speed.svg")


def _axes(count: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure_, axes = pyplot.subplots(
        1, count, figsize=(3.2 * count + 2, height), sharey=True, squeeze=False
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure_, list(axes[0])


def _save(figure_: Any, path: Path) -> None:
    figure_.savefig(path, bbox_inches="tight", metadata={"Date": None})
    # matplotlib ends lines with blanks.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def draw_outcomes(cells: dict[tuple[str, str], Cell], path: Path) -> None:
    names = titles(cells)
    conditions = sorted({c for _, c in cells})
    figure_, axes = _axes(len(conditions), 0.4 * len(names) + 1.3)
    for axis, condition in zip(axes, conditions, strict=True):
        for row, name in enumerate(reversed(names)):
            cell, left = cells.get((name, condition), Cell([])), 0.0
            for outcome in OUTCOMES:
                share = 100 * cell.count(outcome) / max(1, len(cell.asked))
                axis.barh(row, share, left=left, color=COLOURS[outcome], height=0.65)
                left += share
        axis.set_yticks(range(len(names)), [names[n] for n in reversed(names)])
        under = condition == "ceiling"
        axis.set_title("ceiling" if under else f"{condition} faults per 100", size=10)
        axis.set_xlabel("% of the requests", size=9)
        axis.set_xlim(0, 100)
    figure_.legend(
        [mark(colour) for colour in COLOURS.values()],
        ["right", "wrong", "cut, looks whole", "lost or hung"],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4,
        frameon=False,
    )
    _save(figure_, path)


def mark(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def draw_times(cells: dict[tuple[str, str], Cell], path: Path) -> None:
    """Median to p99 of the time to the end, of answers that were right."""
    names = titles(cells)
    conditions = sorted({c for _, c in cells})
    figure_, axes = _axes(len(conditions), 0.4 * len(names) + 1.0)
    for axis, condition in zip(axes, conditions, strict=True):
        for row, name in enumerate(reversed(names)):
            cell = cells.get((name, condition))
            if cell is None or not cell.right:
                continue
            times = cell.times("end")
            p50, p95, p99 = (percentile(times, s) / 1e3 for s in (0.5, 0.95, 0.99))
            axis.plot([p50, p99], [row, row], color="#8a9099", zorder=1)
            axis.scatter(
                [p50, p95, p99], [row] * 3, c=["#2b6cb0", "#6aa0d8", "#1a365d"]
            )
        axis.set_yticks(range(len(names)), [names[n] for n in reversed(names)])
        axis.set_xscale("log")
        axis.set_xlim(*TIMES)
        axis.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        axis.set_xticks([], minor=True)
        under = condition == "ceiling"
        axis.set_title("ceiling" if under else f"{condition} faults per 100", size=10)
        axis.set_xlabel("s to the end: p50, p95, p99", size=9)
    _save(figure_, path)


def draw_speed(cells: dict[tuple[str, str], Cell], path: Path) -> None:
    """Tokens/s and processor time of a token without faults; a point for each round."""
    names = titles(cells)
    figure_, axes = _axes(2, 0.4 * len(names) + 1.0)
    for axis, over, under, factor, label in (
        (axes[0], "tokens", "seconds", 1.0, "tokens/s"),
        (axes[1], "cpu_s", "tokens", 1e3, "CPU ms/token"),
    ):
        for row, name in enumerate(reversed(names)):
            found = cells.get((name, "0"))
            rows = [r for r in found.rows if r[under]] if found is not None else []
            values = [factor * r[over] / r[under] for r in rows]
            if values:
                axis.barh(row, statistics.median(values), color="#b9c7d9", height=0.6)
                axis.scatter(
                    values, [row] * len(values), color="#1a365d", s=12, zorder=2
                )
        axis.set_yticks(range(len(names)), [names[n] for n in reversed(names)])
        axis.set_xlabel(label, size=9)
    _save(figure_, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--table", action="store_true", help="prints it, no more")
    parser.add_argument("--publish", action="store_true", help="into docs/")
    asked = parser.parse_args()
    data = json.loads(asked.data.read_text())
    TITLES.update(data["about"].get("titles", {}))
    is_card = data["about"].get("card", False)
    if asked.table:
        print(tables(data))
        return
    if not asked.publish:
        TRIED.mkdir(parents=True, exist_ok=True)
        draw(data, TRIED)
        (TRIED / "table.md").write_text(tables(data) + "\n")
        print(f"table and plots: {TRIED.relative_to(ROOT)}; PUBLISH=1: into docs/")
        return
    publish(data, asked.data, "scoreboard-card" if is_card else "scoreboard")


def publish(data: dict[str, Any], file: Path, name: str) -> None:
    """Into docs/: the plots with the data beside them, and the table of that name."""
    place = DOCS / name.removeprefix("scoreboard").removeprefix("-")
    place.mkdir(parents=True, exist_ok=True)
    if file.resolve() != (place / "scoreboard.json").resolve():
        shutil.copyfile(file, place / "scoreboard.json")
    draw(data, place)
    page = PAGE.read_text()
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{tables(data)}\n\n{end}{after}")


if __name__ == "__main__":
    main()
