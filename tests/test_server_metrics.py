"""What docs/metrics.md and examples/ say of the metrics is what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mlx_safe.server.exchange import Exchange
from mlx_safe.server.live import Live
from mlx_safe.server.metrics import Metrics
from mlx_safe.server.scheduler import Scheduler
from mlx_safe.server.step import Step
from support.programs import program
from support.server import CONTROLLED, Server, kept_in

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"\bmlx_safe_\w+")


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = kept_in(tmp_path_factory.mktemp("kv"))
    with Server(tiny_model, *flags, program=CONTROLLED) as found:
        found.wait_ready()
        assert found.chat(max_tokens=4).status == 200
        found.plan("decode:2:2")
        assert found.chat(max_tokens=4).status == 200
        yield found


@pytest.fixture(scope="module")
def exported(server: Server) -> dict[str, str]:
    """Names of the families, with ``_total`` of counters, and their kinds."""
    return {
        f.name + ("_total" if f.type == "counter" else ""): f.type
        for f in text_string_to_metric_families(server.get("/metrics").body)
    }


def test_the_table_has_all_of_them(exported: dict[str, str]) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \| .+ \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert dict(rows) == exported


def test_names_are_as_prometheus_wants_them(exported: dict[str, str]) -> None:
    for name, kind in exported.items():
        assert name.startswith("mlx_safe_")
        assert name.endswith("_total") == (kind == "counter"), name
        assert "milli" not in name and not name.endswith(("_ms", "_kb", "_mb")), name
        if kind == "histogram":
            assert name.endswith("_seconds")
        if re.search(r"memory_\w+$", name) and kind == "gauge":
            assert name.endswith("_bytes"), name


def names_in(expr: str, exported: dict[str, str]) -> list[str]:
    """Of its metrics, those that the server has not."""
    found = NAME.findall(expr)
    assert found, expr
    known = {*exported}
    for name, kind in exported.items():
        if kind == "histogram":
            known |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return [name for name in found if name not in known]


def labels_in(expr: str) -> list[tuple[str, str]]:
    """(metric, label) of its selectors and groupings."""
    found = [
        (name, label)
        for name, inside in re.findall(r"(mlx_safe_\w+)\{([^}]*)\}", expr)
        for label in re.findall(r"(\w+)[=!]", inside)
    ]
    for inside, rest in re.findall(r"by \((\w+)\) \(([^)]*)", expr):
        found += [(name, inside) for name in NAME.findall(rest)]
    return [pair for pair in found if pair[1] != "instance"]


def test_the_dashboard_asks_for_what_there_is(
    server: Server, exported: dict[str, str]
) -> None:
    text = (ROOT / "examples" / "grafana-dashboard.json").read_text()
    dashboard = json.loads(text)
    exprs = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    exprs += [a["expr"] for a in dashboard["annotations"]["list"]]
    assert len(exprs) > 20
    samples = server.get("/metrics").body
    for expr in exprs:
        assert names_in(expr, exported) == [], expr
        for name, label in labels_in(expr):
            assert re.search(rf"^{name}\{{[^}}]*\b{label}=", samples, re.MULTILINE), (
                expr
            )
    places = [tuple(p["gridPos"].values()) for p in dashboard["panels"]]
    assert len(places) == len(set(places))


def test_the_alerts_ask_for_what_there_is(exported: dict[str, str]) -> None:
    text = (ROOT / "examples" / "prometheus-alerts.yml").read_text()
    (group,) = yaml.safe_load(text)["groups"]
    assert len(group["rules"]) > 5
    for rule in group["rules"]:
        assert names_in(rule["expr"], exported) == []
        assert rule["annotations"]["summary"]


def test_a_scrape_is_what_prometheus_would_write_of_it() -> None:
    """Whatever has changed since the scrape before, whose text is used again."""

    def scraped(text: bytes) -> list[str]:
        # What MLX and the system count goes on meanwhile.
        lines = text.decode().splitlines()
        return [line for line in lines if not line.startswith("mlx_safe_memory")]

    tokens = 1
    scheduler: Any = Scheduler(None, 2, 1.0)  # type: ignore[arg-type]
    metrics = Metrics(Live(scheduler, Step(), dict), lambda: tokens, lambda: 1.0)
    for status in (200, 200, 400, 200):
        exchange = Exchange()
        exchange.close(status, True)
        metrics.count(exchange)
        metrics.replays.inc()
        tokens += 7
        expected = generate_latest(metrics.registry)
        assert scraped(metrics.render()) == scraped(expected)
        assert scraped(metrics.render()) == scraped(expected)
    samples = text_string_to_metric_families(metrics.render().decode())
    found = {s.name: s.value for family in samples for s in family.samples}
    assert found["mlx_safe_generated_tokens_total"] == 29
    assert found["mlx_safe_replays_total"] == 4


def test_any_registry_can_have_those_of_the_process() -> None:
    code = program("metrics_of_the_process")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["1.0", "True", "1"], done.stderr


def test_the_library_needs_no_prometheus() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import mlx_safe; mlx_safe.install(); mlx_safe.metrics\n"
        "try: mlx_safe.metrics.register()\n"
        "except ImportError as e: print('ImportError')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "ImportError\n", done.stderr
