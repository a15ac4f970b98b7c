"""The queries of alerts, dashboard and autoscaling parse, and use metrics and labels that the server exports."""

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import grpc
import promql_parser
import pytest
from tests.helm.chart import VALUE_SETS, Manifest, render, rendered, values_of
from tests.support.processes import free_port, server
from tools.chart import CHART

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

# The sample names of a scrape, each with its label names.
Samples: TypeAlias = dict[str, set[str]]

# Labels that Prometheus adds to the samples of a ServiceMonitor's target.
TARGET_LABELS = {"namespace", "service", "pod", "job", "instance"}


def samples_of(exposition: str) -> Samples:
    """Parse the text of a scrape."""
    samples: Samples = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", exposition, re.MULTILINE):
        samples.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return samples


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The samples of a running server after one request."""
    metrics = f"127.0.0.1:{free_port()}"
    with (
        server(tmp_path_factory.mktemp("served"), "--metrics-listen", metrics) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        text_generation_pb2_grpc.TextGenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="Hi"))
        with urllib.request.urlopen(f"http://{metrics}/metrics") as scrape:
            return samples_of(scrape.read().decode())


class Query(NamedTuple):
    """A PromQL query of the chart, and its location."""

    location: str
    text: str

    def selectors(self) -> Iterator[promql_parser.VectorSelector]:
        """Yield the vector selectors of the query."""
        found: list[promql_parser.VectorSelector] = []

        def visit(node: promql_parser.Expr) -> None:
            if isinstance(node, promql_parser.VectorSelector):
                found.append(node)

        promql_parser.walk(promql_parser.parse(self.text), visit)
        yield from found

    def grouped_by(self) -> set[str]:
        """Return the labels that its aggregations keep."""
        kept: set[str] = set()

        def visit(node: promql_parser.Expr) -> None:
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                kept.update(node.modifier.labels)

        promql_parser.walk(promql_parser.parse(self.text), visit)
        return kept


def dashboard() -> dict[str, Any]:
    """Load the chart's dashboard."""
    content: dict[str, Any] = json.loads((CHART / "files/dashboard.json").read_text(encoding="utf-8"))
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Return every query of the dashboard, with Grafana's duration variable replaced."""
    texts = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    variables = [v for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    for variable in variables:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
        assert query is not None
        assert query[2] == variable["name"]
        texts.append((variable["name"], f"sum by ({query[2]}) ({query[1]})"))
    return [Query(f"dashboard: {title}", text.replace("$__rate_interval", "5m")) for title, text in texts]


def rules_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


def chart_queries(value_set: str) -> list[Query]:
    """Return every query of an install with these values, except the dashboard's."""
    release = rendered(value_set)
    queries = [
        Query(f"alert: {rule['alert']}", rule["expr"])
        for manifest in release.of("PrometheusRule")
        for rule in rules_of(manifest)
    ]
    for scaler in release.of("ScaledObject"):
        queries += [Query("autoscaling", trigger["metadata"]["query"]) for trigger in scaler["spec"]["triggers"]]
    return queries


QUERIES = sorted({*dashboard_queries(), *(query for name in VALUE_SETS for query in chart_queries(name))})


def test_queries_of_all_three_kinds_were_found() -> None:
    """The parametrized tests below cover alerts, autoscaling and dashboard."""
    assert {query.location.split(":")[0] for query in QUERIES} == {"alert", "autoscaling", "dashboard"}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.location)
def test_the_server_exports_metrics_and_labels(query: Query, served: Samples) -> None:
    """Each metric of a query is in a scrape, with the labels that the query uses."""
    selectors = list(query.selectors())
    assert selectors
    for selector in selectors:
        assert selector.name in served
        labels = served[str(selector.name)] | TARGET_LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
        assert query.grouped_by() <= labels


@pytest.mark.parametrize("query", [query for query in QUERIES if query.location[:9] != "dashboard"], ids=str)
def test_alerts_and_autoscaling_select_their_release_only(query: Query) -> None:
    """Another release in the cluster does not affect them."""
    for selector in query.selectors():
        matchers = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert matchers["namespace"] == "text"
        assert matchers["service"] == "llama2-headless"


def test_every_metric_is_on_the_dashboard(served: Samples) -> None:
    """The dashboard shows each metric of the server, a histogram by its buckets."""
    shown = {str(selector.name) for query in dashboard_queries() for selector in query.selectors()}
    parts = re.compile(r"_(sum|count|created)$")
    buckets = {parts.sub("_bucket", name) for name in served}
    assert {name for name in buckets if name.startswith("llama2_")} <= shown


def test_panels_are_described() -> None:
    """Each panel has a title and a description, and its legends use labels that its query keeps."""
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            query = Query(panel["title"], target["expr"].replace("$__rate_interval", "5m"))
            whole = isinstance(promql_parser.parse(query.text), promql_parser.VectorSelector)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= (
                TARGET_LABELS if whole else query.grouped_by()
            )


def test_panels_do_not_overlap() -> None:
    """Panel ids and grid cells are unique, and all panels use the selected data source."""
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in dashboard()["panels"]
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


def test_the_dashboard_is_deployed_unchanged() -> None:
    """The ConfigMap has the exact text of the file, and the label that Grafana's sidecar selects."""
    (config,) = rendered("everything-on").by_template["dashboard.yaml"]
    assert config["data"] == {"llama2.json": (CHART / "files/dashboard.json").read_text(encoding="utf-8")}
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_alerts_are_described_and_use_the_thresholds() -> None:
    """Each alert has a severity, a summary, a description and a delay; thresholds come from the values."""
    release = rendered("everything-on")
    manifest = release.one("PrometheusRule")
    assert manifest["metadata"]["labels"]["release"] == "prometheus"
    rules = {rule["alert"]: rule for rule in rules_of(manifest)}
    for rule in rules.values():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+m", rule["for"])
    assert rules["Llama2SlowFirstToken"]["expr"].endswith("> 10")
    assert rules["Llama2Errors"]["expr"].endswith("> 0.01")
    assert rules["Llama2UsageLag"]["expr"].endswith("> 120")
    assert rules["Llama2UsageRecordsPending"]["expr"].endswith("> 25000")
    assert rules["Llama2ReplicaNotReady"]["for"] == "20m"  # startupSeconds plus five minutes


def test_the_alerts_about_a_store_require_it() -> None:
    """Without Redis or PostgreSQL, the chart has no alert about it."""
    values = values_of("demo") | {"alerts": {"enabled": True}, "serviceMonitor": {"enabled": True}}
    names = {rule["alert"] for rule in rules_of(render(values).one("PrometheusRule"))}
    assert {rule["alert"] for rule in rules_of(rendered("everything-on").one("PrometheusRule"))} - names == {
        "Llama2QuotaStoreUnavailable",
        "Llama2UsageStoreUnavailable",
    }
