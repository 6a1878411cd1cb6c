"""A short run of ``make scoreboard``: does it tell the servers apart, and draw it?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scoreboard_draw import cells_of, tables
from scoreboard_load import make_script, plan_faults

BENCH = Path(__file__).parent.parent.parent / "bench"
LIMIT_S = 500
# Below what the stock server needs for one of the script's long prompts alone (36 MB),
# whoever shares its batch; the protected one reads it in steps of 9 MB.
CEILING = 24_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("scoreboard") / "data.json"
    # Many faults, so that some strike a batch.
    command = [sys.executable, str(BENCH / "scoreboard.py"), "--seed", "3"]
    command += ["--requests", "24", "--rounds", "1", "--rates", "25", "--out", str(out)]
    command += ["--servers", "stock", "mlx-safe", "--ceiling", str(CEILING)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3" in done.stdout
    return json.loads(out.read_text())


def test_the_stock_server_loses_what_the_protected_one_answers(data: Any) -> None:
    cells = cells_of(data)
    stock, ours = cells["stock", "25"], cells["mlx-safe", "25"]
    assert stock.count("lost") + stock.count("cut") > 0
    assert ours.total("fired") > 0
    assert {q["outcome"] for q in ours.asked} == {"right"}


def test_only_the_protected_one_stays_below_a_ceiling(data: Any) -> None:
    cells = cells_of(data)
    assert cells["stock", "ceiling"].total("struck") > 0
    ours = cells["mlx-safe", "ceiling"]
    assert ours.total("struck") == 0
    assert ours.total("peak") <= ours.total("ceiling")
    assert {q["outcome"] for q in ours.asked} == {"right"}


def test_the_table_has_a_line_for_each(data: Any) -> None:
    lines = tables(data).splitlines()
    assert sum(line.startswith("| mlx-safe serve |") for line in lines) == 2
    assert sum(line.startswith("| mlx_lm.server |") for line in lines) == 2
    assert "### No faults, a GPU of 24.0 MB" in lines


def test_a_seed_is_a_script() -> None:
    one, two, other = make_script(5, 50), make_script(5, 50), make_script(6, 50)
    for script in (one, two):
        plan_faults(script, 5, 10)
    assert one == two
    assert one != other
    assert sum(bool(t.fault) for t in one.turns) == round(len(one.turns) / 10)
