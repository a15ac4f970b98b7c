"""containerd for the pods of a node, with Debian's or the project's own network plugins."""

import json
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.node.images import PAUSE, pause_image
from tests.support.node.isolation import BRIDGE, NETWORK, run
from tests.support.servers.kubernetes_server import program, start

PLUGINS = [Path("/usr/lib/cni"), Path("/opt/cni/bin")]
# Lowering the OOM score of a process needs a right that containers and some virtual machines do not have.
CONFIGURATION = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{folder}/network"
"""
POD_NETWORK = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": NETWORK, "rangeStart": NETWORK.replace("0/24", "10")}]],
            },
        }
    ],
}


@dataclass(frozen=True)
class Runtime:
    """A running containerd."""

    path: Path
    client: str

    @property
    def endpoint(self) -> str:
        """The address for the kubelet."""
        return f"unix://{self.path}"

    def load(self, archive: Path) -> None:
        """Load the images of an archive."""
        run(self.client, f"--address={self.path}", "--namespace=k8s.io", "images", "import", str(archive))


def start_runtime(stack: ExitStack, assets: Path, folder: Path) -> Runtime:
    """Run containerd until the end of the stack; skip the test if a program is missing."""
    containerd, client, _ = (program(assets, name) for name in ("containerd", "ctr", "runc"))
    compiler = program(assets, "cc")
    plugins = next((path for path in PLUGINS if (path / "bridge").exists()), None)
    if plugins is None:
        pytest.skip(f"NOT TESTED WITH A NODE: no network plugins in {' or '.join(map(str, PLUGINS))}")
    (folder / "network").mkdir()
    (folder / "network/pods.conflist").write_text(json.dumps(POD_NETWORK))
    configuration = folder / "containerd.toml"
    configuration.write_text(CONFIGURATION.format(folder=folder, pause=PAUSE, plugins=plugins))
    process = start(stack, folder, [containerd, f"--config={configuration}"])
    runtime = Runtime(folder / "containerd.sock", client)
    process.wait_until(lambda: accepts(runtime.path))
    runtime.load(pause_image(folder, compiler))
    return runtime


def accepts(path: Path) -> bool:
    """Return whether a server accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
