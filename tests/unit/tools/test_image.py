"""Parts of `make image-test` that need neither root nor an image."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.container.dockerfile import read_stages
from tools.container.image.build import Bases, pip_volumes, write_pip_config
from tools.container.image.checks import check_size
from tools.container.image.command import ImageError, run
from tools.container.image.container import specification
from tools.container.image.seccomp import runtime_profile

ALLOW = "SCMP_ACT_ALLOW"
PROFILE: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "syscalls": [
        {"names": ["read"], "action": ALLOW, "args": [], "includes": {}, "excludes": {}},
        {"names": ["personality"], "action": ALLOW, "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        {"names": ["arch_prctl"], "action": ALLOW, "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["s390_pci_mmio_read"], "action": ALLOW, "includes": {"arches": ["s390x"]}},
        {"names": ["chroot"], "action": ALLOW, "includes": {"caps": ["CAP_SYS_CHROOT"]}},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_CHROOT"]}},
    ],
}


def test_profile_without_capabilities() -> None:
    """Only the entries for x86-64 and for a container without capabilities remain, with their arguments and errors."""
    profile = runtime_profile(PROFILE)
    assert profile["syscalls"] == [
        {"names": ["read"], "action": ALLOW},
        {"names": ["personality"], "action": ALLOW, "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        {"names": ["arch_prctl"], "action": ALLOW},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
    ]
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_profile_with_a_capability() -> None:
    """An entry for a capability replaces the one for containers without it."""
    rules = runtime_profile(PROFILE, {"CAP_SYS_CHROOT"})["syscalls"]
    assert [rule["action"] for rule in rules if rule["names"] == ["chroot"]] == [ALLOW]


def test_bases_are_those_of_the_dockerfile() -> None:
    """The images that the build replaces have the full names of the FROM instructions, with their digests."""
    bases = Bases.read()
    assert list(bases.names) == [stage.base for stage in read_stages()]
    assert bases.release == "bookworm"


def test_bases_of_other_distributions_are_rejected(tmp_path: Path) -> None:
    """Debian's packages cannot stand in for another distribution."""
    (tmp_path / "Dockerfile").write_text("FROM python:3.11.16-alpine3.20 AS build\nFROM fedora\n")
    with pytest.raises(ValueError, match="official Python images of one Debian release"):
        Bases.read(tmp_path / "Dockerfile")


def test_pip_variables_reach_the_build(tmp_path: Path) -> None:
    """The build gets the PIP_ variables as a file, and the folders and files that they name."""
    variables = {"PIP_FIND_LINKS": f"file://{tmp_path} https://example.com/wheels", "PIP_CERT": "/missing", "HOME": "/"}
    assert pip_volumes(variables) == [f"--volume={tmp_path}:{tmp_path}:ro"]
    option = write_pip_config(tmp_path / "pip.conf", variables)
    assert option == f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro"
    lines = (tmp_path / "pip.conf").read_text().splitlines()
    assert lines == ["[global]", "cert = /missing", f"find-links = file://{tmp_path} https://example.com/wheels"]


def test_the_container_has_the_settings_of_the_image() -> None:
    """User, command, variables and directory come from the image; it has no capabilities and a read-only root."""
    image = {"User": "65532:65532", "Entrypoint": ["llama2-server"], "Env": ["HOME=/data"], "WorkingDir": "/data"}
    document = specification(Path("/root"), image, [], runtime_profile(PROFILE), {"NAME": "value"})
    process = document["process"]
    assert process["user"] == {"uid": 65532, "gid": 65532}
    assert (process["args"], process["env"], process["cwd"]) == (
        ["llama2-server"],
        ["HOME=/data", "NAME=value"],
        "/data",
    )
    assert set(process["capabilities"]) == {"bounding", "effective", "inheritable", "permitted", "ambient"}
    assert not any(process["capabilities"].values())
    assert process["noNewPrivileges"]
    assert document["root"] == {"path": "/root", "readonly": True}
    assert json.loads(json.dumps(document)) == document


def test_a_failed_command_reports_its_output() -> None:
    """The message has the command, the exit code and the output."""
    with pytest.raises(ImageError, match=r"sh -c 'echo broken; exit 3': exit code 3\nbroken"):
        run(["sh", "-c", "echo broken; exit 3"])


def test_an_image_above_the_limit_fails() -> None:
    """The limit is 1.0 GB."""
    assert check_size(999_999_999) == "ok      image: 1000 MB, the limit is 1000 MB"
    with pytest.raises(ImageError, match="FAILED  image: 1000 MB"):
        check_size(1_000_000_000)
