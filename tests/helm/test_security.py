"""Pod security, service accounts and Secrets."""

from typing import Any

from tests.helm.chart import Rendered, containers_of


def test_pods_meet_the_restricted_profile(release: Rendered) -> None:
    """Pods meet the restricted Pod Security profile, with a read-only root and without a cluster token."""
    for pod in release.pods():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} < {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret"}
        for container in containers_of(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
    for account in release.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_service_account_exists(release: Rendered) -> None:
    """Pods use the chart's ServiceAccount, or the account named in the values."""
    accounts = [account["metadata"]["name"] for account in release.of("ServiceAccount")] or ["default"]
    assert [pod["spec"]["serviceAccountName"] for pod in release.pods()] == accounts * len(list(release.pods()))


def test_service_links_are_disabled(release: Rendered) -> None:
    """With service links, a Service named llama2 would add LLAMA2_PORT=tcp://… to every pod of its namespace."""
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in release.pods())


def secrets_in(node: Any) -> set[str]:
    """Return the names of all Secrets that a manifest refers to."""
    if isinstance(node, list):
        return {name for item in node for name in secrets_in(item)}
    if not isinstance(node, dict):
        return set()
    names = {node["secretName"]} if "secretName" in node else set()
    if "secretKeyRef" in node:
        names.add(node["secretKeyRef"]["name"])
    return names.union(*map(secrets_in, node.values()))


def test_secrets_come_from_the_values(release: Rendered) -> None:
    """The chart creates no Secret, and refers only to the Secrets in the values."""
    values = release.values
    sections = ("apiKeys", "receipts", "redis", "usage", "tls")
    named = {values[section]["secret"] for section in sections}
    named |= {values["tls"]["clientCaSecret"], values["weights"]["hubToken"]["secret"], values["test"]["clientSecret"]}
    named |= {values["test"]["apiKey"]["secret"], values["test"]["caSecret"]}
    envoy = values["envoy"]
    named |= {envoy["tls"]["secret"], envoy["caSecret"], envoy["clientSecret"]}
    assert secrets_in(release.manifests) <= named - {""}
    assert not release.of("Secret")
    server = {values[section]["secret"] for section in sections} | {values["tls"]["clientCaSecret"]}
    assert server - {""} <= secrets_in(release.pod)
