"""Images of a node without a registry: archives in the format of `docker save`."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

PAUSE = "localhost/pause:test"
# The program of a pod's first container, which owns the namespaces and waits.
PAUSE_SOURCE = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


def server_image(assets: Path) -> tuple[Path, str]:
    """Return the archive of the server's image, and the image's name; skip the test without an archive."""
    archive = assets / "image.tar"
    if not archive.exists():
        pytest.skip(f"NOT TESTED WITH A NODE: {archive} is missing (the server's image, from `docker save`)")
    with tarfile.open(archive) as content:
        manifest = content.extractfile("manifest.json")
        assert manifest is not None
        (image,) = json.load(manifest)
    (name,) = image["RepoTags"]
    return archive, name


def pause_image(folder: Path, compiler: str) -> Path:
    """Write an archive with an image that only waits, and return its path."""
    program, layer = folder / "pause", folder / "pause-layer.tar"
    source = ["-x", "c", "-static", "-Os", "-o", str(program), "-"]
    subprocess.run([compiler, *source], input=PAUSE_SOURCE, text=True, check=True)
    with tarfile.open(layer, "w") as content:
        content.add(program, "pause")
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": [layer.name]}]
    archive = folder / "pause.tar"
    with tarfile.open(archive, "w") as content:
        for name, document in {"config.json": config, "manifest.json": manifest}.items():
            text = json.dumps(document).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            content.addfile(entry, io.BytesIO(text))
        content.add(layer, layer.name)
    return archive
