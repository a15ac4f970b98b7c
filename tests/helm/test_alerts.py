"""The alerts and the autoscaling query, evaluated by Prometheus on sample series."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.helm.chart import rendered

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="NOT TESTED: promtool is not installed (Debian package: prometheus)"
)

TARGET = 'namespace="text",service="llama2-headless",pod="a"'
OTHERS = 'namespace="text",service="other-headless",pod="b"'


class Case(NamedTuple):
    """An alert, series in promtool's notation with one value per minute, and the minute of the evaluation."""

    alert: str
    series: dict[str, str]
    minute: int


FIRES = [
    Case("Llama2NotServing", {"llama2_ready": "1x5 0x30"}, 10),
    Case("Llama2NotServing", {"llama2_max_concurrent_requests": "1x30"}, 10),  # no pod exports its readiness
    Case("Llama2ReplicaNotReady", {"llama2_ready": "0x60"}, 25),
    Case("Llama2QueueGrowing", {"llama2_requests_queued": "1+1x60"}, 30),
    Case("Llama2SlowFirstToken", {
        'llama2_time_to_first_token_seconds_bucket{le="5"}': "0+9x60",
        'llama2_time_to_first_token_seconds_bucket{le="20"}': "0+10x60",
        'llama2_time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x60",
    }, 30),
    Case("Llama2Errors", {
        'llama2_requests_total{code="OK",method="Generate"}': "0+97x60",
        'llama2_requests_total{code="INTERNAL",method="Generate"}': "0+2x60",
        'llama2_requests_total{code="UNAVAILABLE",method="GenerateStream"}': "0+1x60",
    }, 30),
    Case("Llama2UsageLag", {"llama2_usage_lag_seconds": "0+60x60"}, 30),
    Case("Llama2UsageRecordsPending", {"llama2_usage_pending_records": "0+5000x60"}, 30),
    Case("Llama2UsageRecordsRejected", {"llama2_usage_rejected_records": "0x5 1x60"}, 10),
    Case("Llama2QuotaStoreUnavailable", {"llama2_quota_store_up": "0x60"}, 10),
    Case("Llama2UsageDiskFull", {"llama2_usage_disk_writable": "1x5 0x60"}, 10),
    Case("Llama2UsageStoreUnavailable", {"llama2_usage_store_up": "0x60"}, 10),
]  # fmt: skip
DOES_NOT_FIRE = [
    Case("Llama2NotServing", {"llama2_ready": "1x60"}, 30),
    Case("Llama2NotServing", {"llama2_ready": "1x20 0 1x60"}, 22),  # for one minute only
    Case("Llama2ReplicaNotReady", {"llama2_ready": "0x15 1x60"}, 30),  # loading has finished
    Case("Llama2QueueGrowing", {"llama2_requests_queued": "0 5 0 7 0 8x60"}, 4),
    Case("Llama2QueueGrowing", {"llama2_requests_queued": "30-1x30"}, 25),  # the queue shrinks
    Case("Llama2SlowFirstToken", {
        'llama2_time_to_first_token_seconds_bucket{le="5"}': "0+10x60",
        'llama2_time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x60",
    }, 30),
    Case("Llama2Errors", {
        'llama2_requests_total{code="OK",method="Generate"}': "0+97x60",
        'llama2_requests_total{code="RESOURCE_EXHAUSTED",method="Generate"}': "0+50x60",
        'llama2_requests_total{code="INVALID_ARGUMENT",method="Generate"}': "0+50x60",
    }, 30),  # client errors
    Case("Llama2Errors", {'llama2_requests_total{code="OK",method="Generate"}': "0x60"}, 30),  # no requests
    Case("Llama2UsageLag", {"llama2_usage_lag_seconds": "60x60"}, 30),
    Case("Llama2UsageRecordsPending", {"llama2_usage_pending_records": "24000x60"}, 30),
    Case("Llama2UsageRecordsRejected", {"llama2_usage_rejected_records": "0x60"}, 30),
    Case("Llama2QuotaStoreUnavailable", {"llama2_quota_store_up": "1x60"}, 30),
    Case("Llama2UsageDiskFull", {"llama2_usage_disk_writable": "1x60"}, 30),
    Case("Llama2UsageStoreUnavailable", {"llama2_usage_store_up": "0x3 1x60"}, 10),  # for three minutes only
]  # fmt: skip


def series_of(case: Case, target: str = TARGET) -> list[dict[str, str]]:
    """Return the series of a case in promtool's format."""
    series = []
    for series_name, values in case.series.items():
        name, _, labels = series_name.removesuffix("}").partition("{")
        series.append({"series": f"{name}{{{','.join(filter(None, (target, labels)))}}}", "values": values})
    return series


def promtool_failures(directory: Path, test: dict[str, Any]) -> str:
    """Run `promtool test rules`; return its output if the test fails, else an empty string."""
    assert PROMTOOL is not None
    rules = rendered("everything-on").one("PrometheusRule")["spec"]
    (directory / "rules.json").write_text(json.dumps(rules))
    (directory / "test.json").write_text(
        json.dumps({"rule_files": ["rules.json"], "tests": [test | {"interval": "1m"}]})
    )
    command = [PROMTOOL, "test", "rules", "test.json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def alerts_at(case: Case, directory: Path, target: str = TARGET) -> bool:
    """Return whether the alert fires at the minute of the case."""
    # promtool compares with the expected alerts: the test passes if none fires.
    expected = {"eval_time": f"{case.minute}m", "alertname": case.alert, "exp_alerts": []}
    failures = promtool_failures(directory, {"input_series": series_of(case, target), "alert_rule_test": [expected]})
    assert not failures or f"alertname: {case.alert}" in failures.replace(",", ""), failures
    return bool(failures)


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    """Prometheus' linter finds no error in the rules and the templates of their annotations."""
    assert PROMTOOL is not None
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(rendered("everything-on").one("PrometheusRule")["spec"]))
    command = [PROMTOOL, "check", "rules", "--lint-fatal", str(rules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "11 rules found" in done.stdout


@pytest.mark.parametrize("case", FIRES, ids=str)
def test_the_alert_fires(case: Case, tmp_path: Path) -> None:
    """Each alert fires when its condition lasts for its `for` duration."""
    assert alerts_at(case, tmp_path)


@pytest.mark.parametrize("case", DOES_NOT_FIRE, ids=str)
def test_the_alert_does_not_fire(case: Case, tmp_path: Path) -> None:
    """No alert fires for a healthy service, a short error or client errors."""
    assert not alerts_at(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in FIRES if case.alert != "Llama2NotServing"], ids=str)
def test_series_of_another_release_do_not_fire_the_alert(case: Case, tmp_path: Path) -> None:
    """The alerts ignore the same series of another Service in the namespace."""
    assert not alerts_at(case, tmp_path, OTHERS)


def test_every_alert_has_cases() -> None:
    """Each alert has a case that fires it and a case that does not."""
    alerts = {rule["alert"] for rule in rendered("everything-on").one("PrometheusRule")["spec"]["groups"][0]["rules"]}
    assert {case.alert for case in FIRES} == {case.alert for case in DOES_NOT_FIRE} == alerts


# Two replicas with one slot each, which hold a slot for 30 s per request.
TWO_REPLICAS = {"llama2_max_concurrent_requests": "1x30", "llama2_mean_slot_time_seconds": "30x30"}


@pytest.mark.parametrize(
    ("running", "queued", "rejections", "expected"),
    [
        ("1x30", "16x30", "0x30", 34.0),  # a blocked queue, from which no request ever gets a slot
        ("1x30", "16x30", "0+60x30", 94.0),  # the queue is full and rejects a request per second at each replica
        ("0x30", "0x30", "0x30", 0.0),  # idle
        ("1x30", "0x30", "0x30", 2.0),  # busy, and nothing waits
        ("1x20 _x10", "16x20 _x10", "0x20 _x10", None),  # the scrape has ended
    ],
)
def test_autoscaling_counts_the_slots_that_requests_need(
    running: str, queued: str, rejections: str, expected: float | None, tmp_path: Path
) -> None:
    """KEDA's query counts running, queued and rejected requests, and has no value without scraped samples."""
    (trigger,) = rendered("everything-on").one("ScaledObject")["spec"]["triggers"]
    counts = {"llama2_requests_running": running, "llama2_requests_queued": queued}
    series = counts | {"llama2_queue_rejections_total": rejections} | TWO_REPLICAS
    pods = [TARGET, TARGET.replace('pod="a"', 'pod="c"'), OTHERS]
    inputs = [sample for pod in pods for sample in series_of(Case("", series, 28), pod)]
    samples = [] if expected is None else [{"labels": "{}", "value": expected}]
    expression = {"expr": trigger["metadata"]["query"], "eval_time": "28m", "exp_samples": samples}
    assert promtool_failures(tmp_path, {"input_series": inputs, "promql_expr_test": [expression]}) == ""


def test_quota_rejections_do_not_add_replicas() -> None:
    """The query reads the queue's own rejections, not the calls with RESOURCE_EXHAUSTED."""
    (trigger,) = rendered("everything-on").one("ScaledObject")["spec"]["triggers"]
    assert "requests_total" not in trigger["metadata"]["query"]
    assert "or vector" not in trigger["metadata"]["query"]
