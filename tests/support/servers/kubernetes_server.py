"""A real API server of Kubernetes for tests, with etcd, on free loopback ports; without controllers and nodes."""

import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import yaml
from tests.support.certificates import Authority
from tests.support.processes import free_ports
from tests.support.servers.cluster_assets import definitions
from tests.support.servers.kubernetes_client import KubernetesClient

START_SECONDS = 180  # only ends a start that hangs
TWO_FAMILIES = (1, 21)  # the first version that gives Services two addresses by default
PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Cluster:
    """A running API server."""

    address: str
    client: KubernetesClient
    kubeconfig: Path

    @property
    def version(self) -> tuple[int, int]:
        """The major and minor version."""
        return numbers(self.client.request("GET", "/version")[0]["gitVersion"])


def numbers(version: str) -> tuple[int, int]:
    """Return the major and minor version of a text such as v1.36.2."""
    found = re.search(r"v(\d+)\.(\d+)", version)
    assert found, f"no version: {version}"
    return int(found[1]), int(found[2])


def program(assets: Path, name: str) -> str:
    """Return the path of a program, from the assets or installed; skip the test without it."""
    found = shutil.which(name, path=f"{assets / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if found is None:
        pytest.skip(f"NOT TESTED WITH A CLUSTER: {name} is neither in {assets / 'bin'} nor installed")
    return found


class LoggedProcess:
    """A process that writes its output to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            # etcd and the API server also read settings from the environment.
            environment = {"PATH": PROGRAMS}
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            RuntimeError: the process has ended, or the condition did not hold in time; with the end of the log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
                deadline = 0.0
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._log.stem} did not start:\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End the process, and wait for its end."""
        self._process.kill()
        self._process.wait()


def start(stack: ExitStack, folder: Path, command: list[str]) -> LoggedProcess:
    """Start a program until the end of the stack; its log is in the folder."""
    process = LoggedProcess(command, folder / f"{Path(command[0]).name}.log")
    stack.callback(process.stop)
    return process


def etcd_command(etcd: str, folder: Path, port: int, peer_port: int) -> list[str]:
    """Return the command of an etcd with one member."""
    url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        etcd,
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
    ]


def api_server_command(api_server: str, folder: Path, authority: Authority, port: int, etcd_port: int) -> list[str]:
    """Return the command of an API server with its defaults, and Services with IPv4 and IPv6 if it can."""
    certificate, key = authority.pair()
    version = subprocess.run([api_server, "--version"], capture_output=True, text=True, check=True).stdout
    networks = "10.0.0.0/16,fd00::/108" if numbers(version) >= TWO_FAMILIES else "10.0.0.0/16"
    return [
        api_server,
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",  # a loopback address cannot be an endpoint
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--cert-dir={folder}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--client-ca-file={authority.root_file()}",
        "--authorization-mode=RBAC",
        f"--service-cluster-ip-range={networks}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
    ]


def administrator(folder: Path, authority: Authority, address: str) -> Cluster:
    """Return the cluster with the rights of an administrator, and write the kubeconfig for Helm."""
    certificates = folder / "administrator"
    certificates.mkdir()
    issued = authority.issue(common_name="administrator", organization_name="system:masters")
    certificate, key = authority.write(issued, certificates)
    context = ssl.create_default_context(cafile=authority.root_file())
    context.load_cert_chain(certificate, key)
    server = {"server": f"https://{address}", "certificate-authority": str(authority.root_file())}
    user = {"client-certificate": str(certificate), "client-key": str(key)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": server}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(content))
    return Cluster(address, KubernetesClient(f"https://{address}", context), kubeconfig)


@contextmanager
def running_cluster(assets: Path, folder: Path) -> Iterator[Cluster]:
    """Run etcd and an API server with the definitions of the assets; skip the test if a program is missing."""
    etcd, api_server = program(assets, "etcd"), program(assets, "kube-apiserver")
    port, etcd_port, peer_port = free_ports(3)
    authority = Authority(folder)
    with ExitStack() as stack:
        store = start(stack, folder, etcd_command(etcd, folder, etcd_port, peer_port))
        store.wait_until(lambda: is_healthy(f"http://127.0.0.1:{etcd_port}/health"))
        server = start(stack, folder, api_server_command(api_server, folder, authority, port, etcd_port))
        cluster = administrator(folder, authority, f"127.0.0.1:{port}")
        stack.callback(cluster.client.close)
        server.wait_until(lambda: cluster.client.ready)
        kinds = set()
        for definition in definitions(assets):
            cluster.client.create(definition)
            kinds.add(f'"{definition["spec"]["names"]["kind"]}"')
        server.wait_until(lambda: not kinds or all(kind in cluster.client.discovery for kind in kinds))
        yield cluster


def is_healthy(url: str) -> bool:
    """Return whether a server answers with success."""
    try:
        return httpx2.get(url, trust_env=False).is_success
    except httpx2.TransportError:
        return False
