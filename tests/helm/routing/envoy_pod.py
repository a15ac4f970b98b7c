"""The chart's Envoy as a local process: the rendered configuration and arguments, with other addresses."""

import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.helm.chart import Rendered
from tests.support.servers.envoy_server import Envoy, envoy_command, running_copy
from tests.support.servers.name_server import NameServer


def write_configuration(release: Rendered, folder: Path, mounts: dict[str, Path] | None = None) -> Path:
    """Write the files of Envoy's ConfigMap to a folder, with other paths of the mounted Secrets; return the folder."""
    config = release.component("ConfigMap", "envoy")
    mounts = mounts or {}
    paths = re.compile("|".join(rf"{path}(?=[/}}])" for path in mounts) or r"(?!)")
    folder.mkdir()
    for name, text in config["data"].items():
        (folder / name).write_text(paths.sub(lambda found: str(mounts[found[0]]), text), encoding="utf-8")
    for name, content in config["binaryData"].items():
        (folder / name).write_bytes(base64.b64decode(content))
    return folder


@asynccontextmanager
async def running_envoy_pod(
    release: Rendered,
    folder: Path,
    address: str,
    names: NameServer | None = None,
    mounts: dict[str, Path] | None = None,
) -> AsyncIterator[Envoy]:
    """Run Envoy with the configuration and the arguments of the release, in front of servers at an address or name."""
    envoy_command()
    ((container,),) = (pod["spec"]["containers"] for pod in release.envoys)
    copy = write_configuration(release, folder / "envoy", mounts)
    async with running_copy(copy, address, names, flags=container["args"]) as envoy:
        yield envoy
