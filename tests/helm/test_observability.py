"""Alerts, dashboard and autoscaling ask for metrics and labels that a server shows, in queries that parse."""

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

# What a scrape shows: each sample's name, and the names of its labels.
Samples: TypeAlias = dict[str, set[str]]

# What Prometheus adds to a scrape's samples for a ServiceMonitor's target.
TARGET_LABELS = {"namespace", "service", "pod", "job", "instance"}


def samples_of(exposition: str) -> Samples:
    """The samples of a scrape, given its text."""
    samples: Samples = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", exposition, re.MULTILINE):
        samples.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return samples


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What a running server shows that has served a call."""
    metrics = f"127.0.0.1:{free_port()}"
    with (
        server(tmp_path_factory.mktemp("served"), "--metrics-listen", metrics) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        text_generation_pb2_grpc.TextGenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt="Hi"))
        with urllib.request.urlopen(f"http://{metrics}/metrics") as scrape:
            return samples_of(scrape.read().decode())


class Query(NamedTuple):
    """A query of the chart's, and where it stands."""

    place: str
    text: str

    def selectors(self) -> Iterator[promql_parser.VectorSelector]:
        """What it asks Prometheus for."""
        found: list[promql_parser.VectorSelector] = []

        def visit(node: promql_parser.Expr) -> None:
            if isinstance(node, promql_parser.VectorSelector):
                found.append(node)

        promql_parser.walk(promql_parser.parse(self.text), visit)
        yield from found

    def grouped_by(self) -> set[str]:
        """The labels that its aggregations keep."""
        kept: set[str] = set()

        def visit(node: promql_parser.Expr) -> None:
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                kept.update(node.modifier.labels)

        promql_parser.walk(promql_parser.parse(self.text), visit)
        return kept


def dashboard() -> dict[str, Any]:
    """The dashboard that ships."""
    content: dict[str, Any] = json.loads((CHART / "files/dashboard.json").read_text(encoding="utf-8"))
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Every query of the dashboard, with Grafana's own variable for a duration filled in."""
    texts = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    variables = [v for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    for variable in variables:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
        assert asked is not None
        assert asked[2] == variable["name"]
        texts.append((variable["name"], f"sum by ({asked[2]}) ({asked[1]})"))
    return [Query(f"dashboard: {place}", text.replace("$__rate_interval", "5m")) for place, text in texts]


def rules_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


def chart_queries(value_set: str) -> list[Query]:
    """Every query that an install with these values makes, but the dashboard's."""
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


def test_there_are_queries_of_all_three_kinds() -> None:
    """The tests below look at something."""
    assert {query.place.split(":")[0] for query in QUERIES} == {"alert", "autoscaling", "dashboard"}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_metrics_and_labels_are_served(query: Query, served: Samples) -> None:
    """Each metric of a query is in a scrape, with the labels that the query selects and groups by."""
    selectors = list(query.selectors())
    assert selectors
    for selector in selectors:
        assert selector.name in served
        labels = served[str(selector.name)] | TARGET_LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
        assert query.grouped_by() <= labels


@pytest.mark.parametrize("query", [query for query in QUERIES if query.place[:9] != "dashboard"], ids=str)
def test_alerts_and_autoscaling_see_their_own_release_only(query: Query) -> None:
    """Another release in the cluster neither fires them nor quiets them."""
    for selector in query.selectors():
        matchers = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert matchers["namespace"] == "text"
        assert matchers["service"] == "llama2-headless"


def test_every_metric_is_on_the_dashboard(served: Samples) -> None:
    """What the server counts can be seen; a histogram by its buckets."""
    shown = {str(selector.name) for query in dashboard_queries() for selector in query.selectors()}
    parts = re.compile(r"_(sum|count|created)$")
    buckets = {parts.sub("_bucket", name) for name in served}
    assert {name for name in buckets if name.startswith("llama2_")} <= shown


def test_panels_name_what_they_show() -> None:
    """Each has a title and a description, and its legends use labels that its query keeps."""
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


def test_panels_lie_beside_one_another() -> None:
    """Grafana gets ids and places that do not clash, and one datasource that the reader chooses."""
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in dashboard()["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())


def test_the_dashboard_arrives_as_it_is() -> None:
    """The ConfigMap has the file to the letter, under the label that Grafana's sidecar looks for."""
    (config,) = rendered("everything-on").by_template["dashboard.yaml"]
    assert config["data"] == {"llama2.json": (CHART / "files/dashboard.json").read_text(encoding="utf-8")}
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_alerts_say_what_is_wrong_and_where_to_look() -> None:
    """Each has a severity, a summary and a description, waits a while, and follows the values' thresholds."""
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
    assert rules["Llama2UsageJournalFilling"]["expr"].endswith("> 33554432")
    assert rules["Llama2ReplicaNotReady"]["for"] == "20m"  # startupSeconds, and five minutes


def test_an_alert_about_redis_is_there_with_redis() -> None:
    """Without Redis nothing can be down."""
    values = values_of("demo") | {"alerts": {"enabled": True}, "serviceMonitor": {"enabled": True}}
    names = {rule["alert"] for rule in rules_of(render(values).one("PrometheusRule"))}
    assert "Llama2QuotaStoreUnavailable" not in names
    assert {rule["alert"] for rule in rules_of(rendered("everything-on").one("PrometheusRule"))} - names == {
        "Llama2QuotaStoreUnavailable"
    }
