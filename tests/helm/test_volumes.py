"""Volumes, mounts, weights and the card."""

from pathlib import Path

import helm_python
import pytest
from tests.helm.chart import (
    Manifest,
    Rendered,
    card_of,
    containers_of,
    environment_of,
    render,
    rendered,
    selects,
    values_of,
    volumes_of,
)
from tools.chart import CHART


def mounted_files(release: Rendered, pod: Manifest, container: Manifest) -> dict[str, set[str] | None]:
    """Return the files under each mount of a container; None if the chart does not define them."""
    contents: dict[str, set[str] | None] = {}
    volumes = {volume["name"]: volume for volume in volumes_of(release, pod)}
    for mount in container.get("volumeMounts", []):
        volume = volumes[mount["name"]]
        if volume in release.values["extraVolumes"]:
            contents[mount["mountPath"]] = None
        elif "configMap" in volume:
            (found,) = (m for m in release.of("ConfigMap") if m["metadata"]["name"] == volume["configMap"]["name"])
            contents[mount["mountPath"]] = set(found["data"])
        elif "secret" in volume:
            items = volume["secret"].get("items")
            # The Secret of the receipts may have any public keys; the others are of type kubernetes.io/tls.
            whole = {release.values["receipts"]["key"]} if volume["name"] == "receipts" else {"tls.crt", "tls.key"}
            contents[mount["mountPath"]] = {item["path"] for item in items} if items else whole
        else:
            contents[mount["mountPath"]] = None
    return contents


def test_paths_are_mounted(release: Rendered) -> None:
    """Every path in the environment and the arguments exists in a mounted volume."""
    for pod in release.pods():
        for container in containers_of(pod):
            contents = mounted_files(release, pod, container)
            texts = [value for value in environment_of(container).values() if isinstance(value, str)]
            texts += [argument.rpartition("=")[2] for argument in container.get("args", [])]
            for path in (Path(text) for text in texts if text.startswith("/")):
                (mount,) = (mount for mount in contents if path.is_relative_to(mount))
                names = contents[mount]
                assert names is None or str(path.relative_to(mount)) in names | {"."}


def test_volumes_are_mounted_and_claims_exist(release: Rendered) -> None:
    """Every volume is mounted; each claim exists in the chart or in the values, and every created claim is used."""
    values = release.values
    created = {claim["metadata"]["name"] for claim in release.of("PersistentVolumeClaim")}
    claimed = set()
    for pod in release.pods():
        volumes = {volume["name"] for volume in volumes_of(release, pod)}
        mounts = [mount for container in containers_of(pod) for mount in container.get("volumeMounts", [])]
        assert {mount["name"] for mount in mounts} == volumes
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                claimed.add(volume["persistentVolumeClaim"]["claimName"])
    existing = {values["weights"]["existingClaim"], values["data"]["existingClaim"]} - {""}
    assert claimed == created | existing | set(values["usage"]["forwardClaims"])


def test_the_server_writes_to_data_and_tmp_only(release: Rendered) -> None:
    """The weights, which only the init container writes, are read-only for the server."""
    written = {mount["mountPath"] for mount in release.server["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/data", "/tmp"}  # noqa: S108 - in the pod


def test_the_ledger_file_outlives_the_release() -> None:
    """Usage is on claims that an uninstall keeps; a demo and perReplica have none."""
    assert rendered("production-gpu").workload["spec"]["volumeClaimTemplates"][0]["spec"]["resources"] == {
        "requests": {"storage": "1Gi"}
    }
    deployed = render(values_of("production-gpu") | {"workload": "Deployment"})
    claims = {claim["metadata"]["name"]: claim for claim in deployed.of("PersistentVolumeClaim")}
    assert claims["llama2-data"]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for value_set in ("demo", "per-replica", "everything-on"):
        (data,) = (volume for volume in rendered(value_set).pod["spec"]["volumes"] if volume["name"] == "data")
        assert data["emptyDir"] == {"sizeLimit": "1Gi"}


def test_claims_that_a_scale_down_left_are_forwarded() -> None:
    """A Job for each claim runs `usage forward` with the URL of PostgreSQL, which is required."""
    release = rendered("everything-on")
    jobs = release.of("Job")
    claims = [job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] for job in jobs]
    assert claims == ["data-llama2-2", "data-llama2-3"]
    for job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["llama2-server", "usage", "forward"]
        assert environment_of(container) == {"LLAMA2_USAGE_URL": release.env["LLAMA2_USAGE_URL"]}
    with pytest.raises(helm_python.HelmError, match=r"usage\.forwardClaims: .* set usage\.secret"):
        render(values_of("production-gpu") | {"usage": {"forwardClaims": ["data-llama2-1"]}})


def test_weights_are_downloaded_to_the_served_directory(release: Rendered) -> None:
    """The init container or the Job downloads to the path of --weights, in the same volume, with the Hub token."""
    values = release.values["weights"]
    inits = release.pod["spec"].get("initContainers", [])
    if not values["hubId"]:
        assert inits == []
        return
    (init,) = inits
    if values["download"] == "job":
        assert init["command"] == ["llama2-server", "weights", "wait"]
        (init,) = (job["spec"]["template"]["spec"]["containers"][0] for job in release.of("Job"))
    assert init["command"] == ["llama2-server", "weights", "fetch"]
    assert init["args"][:2] == [values["hubId"], f"--to={release.env['LLAMA2_WEIGHTS']}"]
    assert init["args"][2:] == ([f"--revision={values['revision']}"] if values["revision"] else [])
    token = {"secretKeyRef": {"name": values["hubToken"]["secret"], "key": values["hubToken"]["key"]}}
    assert environment_of(init)["HF_TOKEN"] == token
    assert {"name": "weights", "mountPath": "/weights"} in init["volumeMounts"]


def test_one_job_downloads_for_all_replicas() -> None:
    """The pods have no token, no access to the Hub and a read-only volume; a changed Job has another name."""
    release = rendered("download-job")
    job = release.one("Job")
    pod = job["spec"]["template"]
    (volume,) = (volume for volume in release.pod["spec"]["volumes"] if volume["name"] == "weights")
    assert volume["persistentVolumeClaim"] == {"claimName": "llama2-weights", "readOnly": True}
    assert {"name": "weights", "persistentVolumeClaim": {"claimName": "llama2-weights"}} in pod["spec"]["volumes"]
    assert "HF_TOKEN" not in str(release.pod)
    for _, service in release.services():
        assert not selects(service["selector"], pod)
    without_stores = {"replicas": 1, "redis": {"secret": ""}, "usage": {"secret": ""}}
    closed = render(values_of("download-job") | without_stores)
    assert len(closed.component("NetworkPolicy")["spec"]["egress"]) == 1
    other = render(values_of("download-job") | {"image": {"tag": "0.2.0"}}).one("Job")
    assert other["metadata"]["name"] != job["metadata"]["name"]


def test_weights_of_an_existing_claim_are_served_from_their_directory() -> None:
    """`weights.directory` is a path in the claim, which is mounted read-only."""
    release = rendered("many-replicas")
    assert release.env["LLAMA2_WEIGHTS"] == "/weights/checkpoints/Llama-2-7b-chat-hf"
    assert rendered("mtls").env["LLAMA2_WEIGHTS"] == "/weights"
    (volume,) = (volume for volume in release.pod["spec"]["volumes"] if volume["name"] == "weights")
    assert volume["persistentVolumeClaim"] == {"claimName": "llama-2-7b", "readOnly": True}


def test_the_card_is_mounted_unchanged() -> None:
    """The ConfigMap has the exact text of the card; the demo's card is in the image."""
    shipped = (CHART / "files/cards/llama-2-7b-chat-fp16.yaml").read_text(encoding="utf-8")
    assert rendered("mtls").by_template["card.yaml"][0]["data"] == {"card.yaml": shipped}
    assert card_of(rendered("own-card")).context_length_limit == 4096
    assert rendered("demo").by_template["card.yaml"] == []


def test_weights_come_from_an_image() -> None:
    """The image is mounted in place of a claim, and the server loads the directory in it."""
    release = rendered("image-volume")
    (volume,) = (volume for volume in release.pod["spec"]["volumes"] if volume["name"] == "weights")
    assert volume["image"] == {"reference": "registry.example.com/llama-2-7b-chat-hf:1", "pullPolicy": "Always"}
    assert environment_of(release.server)["LLAMA2_WEIGHTS"] == "/weights/weights"
    assert not any("weights" in claim["metadata"]["name"] for claim in release.of("PersistentVolumeClaim"))
