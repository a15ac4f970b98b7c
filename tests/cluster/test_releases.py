"""Upgrade, rollback and uninstall on a real API server: objects are restored, and usage stays on its volume."""

import re
import shlex
from itertools import pairwise
from typing import Any

import helm_python
import pytest
from tests.cluster.namespaces import RELEASE, Namespace, manifests_of, skip_unless_served
from tests.helm.chart import VALUE_SETS, Values, rendered, values_of

GPU: Values = {"weights": {"hubId": "meta-llama/Llama-2-7b-chat-hf"}, "apiKeys": {"secret": "keys"}}
CLAIM = "llama2-data"


def served_kinds(namespace: Namespace) -> set[tuple[str, str]]:
    """Return the kinds of the value sets that the cluster has, without the pods of hooks."""
    manifests = [manifest for value_set in VALUE_SETS for manifest in rendered(value_set).manifests]
    served = {(found["apiVersion"], found["kind"]) for found in manifests if namespace.client.serves(found)}
    return served - {("v1", "Pod")}


def merged(values: Values, expressions: list[str]) -> Values:
    """Return the values with the expressions of `--set`."""
    result = dict(values)
    for expression in expressions:
        for key, value in helm_python.parse_set_string(expression).items():
            result[key] = result.get(key, {}) | value if isinstance(value, dict) else value
    return result


def settings_of_command(line: str) -> list[str]:
    """Return the expressions of `--set` of a printed command."""
    words = shlex.split(line)
    return [following for word, following in pairwise(words) if word == "--set"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("production-gpu", "many-replicas"),  # other Services, policies and claims of the same StatefulSet
        ("production-gpu", "demo"),  # a StatefulSet becomes a Deployment
        ("per-replica", "download-job"),  # a Deployment becomes a StatefulSet with a Job
        ("everything-off", "everything-on"),
        ("gateway", "everything-off"),
    ],
)
def test_a_rollback_restores_the_objects(namespace: Namespace, first: str, second: str) -> None:
    """An upgrade leaves the objects of its manifests and no others; a rollback restores the objects of the install."""
    skip_unless_served(namespace.cluster, rendered(first))
    skip_unless_served(namespace.cluster, rendered(second))
    kinds = served_kinds(namespace)
    namespace.install(values_of(first))
    before = namespace.objects(kinds)
    upgraded = namespace.upgrade(values_of(second))
    namespace.finish_deletions()
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in upgraded}
    assert set(namespace.objects(kinds)) == names
    namespace.helm.rollback(RELEASE, version=1)
    namespace.finish_deletions()
    assert namespace.objects(kinds) == before
    revisions = namespace.helm.history(RELEASE)
    assert [found["status"] for found in revisions] == ["superseded", "superseded", "deployed"]


def test_an_uninstall_keeps_usage_only(namespace: Namespace) -> None:
    """Of all objects, only the claim with the usage stays; the weights can be downloaded again."""
    manifests = namespace.install(GPU | {"workload": "Deployment"})
    assert namespace.claims() == {CLAIM: True, "llama2-weights": True}
    namespace.helm.uninstall(RELEASE)
    assert namespace.claims() == {CLAIM: True, "llama2-weights": False}
    namespace.finish_deletions()
    kinds = {(manifest["apiVersion"], manifest["kind"]) for manifest in manifests}
    assert set(namespace.objects(kinds)) == {("PersistentVolumeClaim", CLAIM)}
    # An install of the same values uses the claim again.
    namespace.install(GPU | {"workload": "Deployment"})
    assert namespace.claims()[CLAIM]


def refusal(namespace: Namespace, values: Values) -> str:
    """Return the message with which an upgrade to these values stops, before it changes the release."""
    revisions = len(namespace.helm.history(RELEASE))
    for dry_run in ("server", None):
        with pytest.raises(
            helm_python.HelmError, match=f"data: the claim {CLAIM} of a Deployment has the usage"
        ) as error:
            namespace.upgrade(values, dry_run=dry_run)
    assert len(namespace.helm.history(RELEASE)) == revisions
    return str(error.value)


def test_an_upgrade_that_would_lose_usage_stops_and_the_claim_can_be_kept(namespace: Namespace) -> None:
    """A StatefulSet would not use the Deployment's claim. With the printed value, its pod mounts the claim."""
    namespace.install(GPU | {"workload": "Deployment"})
    message = refusal(namespace, GPU)
    (keep,) = re.findall(r"keep it, with one replica: (--set \S+)", message)
    manifests = namespace.upgrade(merged(GPU, settings_of_command(keep)))
    (workload,) = (found for found in manifests if found["kind"] == "StatefulSet")
    volumes: list[dict[str, Any]] = workload["spec"]["template"]["spec"]["volumes"]
    (data,) = (volume for volume in volumes if volume["name"] == "data")
    assert data["persistentVolumeClaim"] == {"claimName": CLAIM}
    assert "volumeClaimTemplates" not in workload["spec"]
    assert namespace.claims()[CLAIM]
    # A rollback, and a second upgrade, keep it as well.
    namespace.helm.rollback(RELEASE, version=1)
    assert namespace.claims()[CLAIM]
    namespace.upgrade(merged(GPU, settings_of_command(keep)))
    assert namespace.claims()[CLAIM]


def test_the_printed_commands_move_usage_to_postgresql(namespace: Namespace) -> None:
    """A Job forwards the claim's records, its selector finds it, and without the claim the upgrade succeeds."""
    namespace.install(GPU | {"workload": "Deployment"})
    upgrade, wait, delete = (line.strip() for line in refusal(namespace, GPU).splitlines()[-3:])
    values = merged(GPU, [text.replace("…", "postgresql") for text in settings_of_command(upgrade)])
    namespace.upgrade(values)
    assert namespace.claims()[CLAIM]
    words = shlex.split(wait)
    assert words[:3] == ["kubectl", "--namespace", namespace.name]
    selector = words[words.index("--selector") + 1]
    (job,) = namespace.client.list("batch/v1", "Job", namespace.name, labelSelector=selector)
    volumes = job["spec"]["template"]["spec"]["volumes"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": CLAIM}} in volumes
    assert namespace.get("apps/v1", "Deployment", RELEASE)["spec"]["replicas"] == 0
    assert shlex.split(delete) == ["kubectl", "--namespace", namespace.name, "delete", "pvc", CLAIM]
    path = namespace.client.collection("v1", "PersistentVolumeClaim", namespace.name)
    namespace.client.request("DELETE", f"{path}/{CLAIM}")
    namespace.finish_deletions()
    final = namespace.upgrade(GPU | {"usage": {"secret": "postgresql"}})
    assert [found["kind"] for found in final if found["kind"] in {"StatefulSet", "Deployment", "Job"}] == [
        "StatefulSet"
    ]
    assert manifests_of(namespace.helm.status(RELEASE)) == final
