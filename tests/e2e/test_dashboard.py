"""The Grafana dashboard: every query asks for a metric that the teacher's side makes, by the name that Ray gives it."""

import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from cluster.job import metrics
from tests.toy import ROOT

METRICS = [(metric.kind, metric.name, ("store", *metric.tags)) for metric in metrics.METRICS]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
WORDS = {
    "abs", "avg", "by", "clamp_min", "deriv", "group_left", "ignoring", "increase", "label_values", "max",
    "max_over_time", "min", "on", "rate", "sum",
}  # fmt: skip
"""Of PromQL, what the dashboard may use."""

EXPORT = """
import json, sys, time, urllib.request
import ray
from ray.util import metrics
from cluster import ray_cluster
from cluster.config import ClusterConfig

class Maker:
    def __init__(self, wanted):
        self.made = []
        for kind, name, tags in wanted:
            metric = getattr(metrics, kind.capitalize())(name, description="of a test", tag_keys=tuple(tags))
            labels = dict.fromkeys(tags, "x")
            metric.inc(5, tags=labels) if kind == "counter" else metric.set(5, tags=labels)
            self.made.append(metric)

    def ready(self):
        return len(self.made)

with ray_cluster.session(ClusterConfig()):
    maker = ray.remote(Maker).remote(json.loads(sys.argv[1]))
    assert ray.get(maker.ready.remote()) == len(json.loads(sys.argv[1]))
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    shown = ""
    while shown.count("# TYPE ray_decant") < len(json.loads(sys.argv[1])) and time.monotonic() < deadline:
        time.sleep(0.5)
        shown = urllib.request.urlopen(url).read().decode()
    print(shown)
"""


def rendered(kind: str, name: str) -> str:
    """A metric's name in Prometheus: Ray puts `ray_` before it, and OpenMetrics `_total` behind that of a counter."""
    return f"ray_{name}_total" if kind == "counter" else f"ray_{name}"


LABELS = {rendered(kind, name): {*tags, "SessionName", "NodeAddress", "WorkerId"} for kind, name, tags in METRICS}


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    assert DASHBOARD["schemaVersion"] in range(36, 43)  # Grafana 9 to 12
    assert DASHBOARD["uid"]
    identifiers = [panel["id"] for panel in PANELS]
    assert len(set(identifiers)) == len(identifiers)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "store"}
    sources = [panel["datasource"] for panel in PANELS] + [t["datasource"] for p in PANELS for t in p["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_lie_on_the_grid_without_overlap() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, (a, b)


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_a_query_names_only_metrics_and_labels_that_exist(title: str, expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        depths = list(itertools.accumulate((c == opening) - (c == closing) for c in expression))
        assert min(depths) >= 0
        assert depths[-1] == 0
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    names = set(re.findall(r"\bray_\w+", bare))
    assert names <= set(LABELS), f"{title} asks for {names - set(LABELS)}"
    labels = {word for name in names for word in LABELS[name]}
    words = set(re.findall(r"[A-Za-z_]\w*", bare)) - names
    assert words <= WORDS | labels, f"{title} uses {words - WORDS - labels}"
    assert "{store=~" in expression  # several jobs may share a Prometheus


def test_every_metric_is_shown() -> None:
    shown = set(re.findall(r"\bray_\w+", " ".join(expression for _, expression in EXPRESSIONS)))
    assert shown == set(LABELS)


def test_ray_renders_metrics_by_these_names() -> None:
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "500"}
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, json.dumps(METRICS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind, name, tags in METRICS:
        assert f"# TYPE {rendered(kind, name)} {kind}" in done.stdout
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(rendered(kind, name) + "{")]
        assert {f'{tag}="x"' for tag in tags} <= set(re.findall(r'\w+="[^"]*"', line))
        assert line.endswith(" 5.0")
