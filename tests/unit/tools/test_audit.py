"""The SBOMs have every locked package, and an audit that looked at no package is not a success."""

import json
from pathlib import Path

import pytest
from tests.support.repository import ROOT
from tools.audit.vulnerabilities import read_report
from tools.container.lock import read_lock


@pytest.mark.parametrize("name", ["server-cpu", "server-cuda"])
def test_sbom_has_every_package(name: str) -> None:
    """Each pin of a lock file is a component with its version, and the product leads to each of them."""
    from tools.audit.sbom import bill_of_materials  # here, because it needs a package of the development extra

    path = ROOT / "requirements" / f"{name}.lock"
    document = json.loads(bill_of_materials(path, "1.2.3"))
    pins = {name: str(pin.version) for name, pin in read_lock(path).items()}
    assert {one["name"]: one["version"] for one in document["components"]} == pins
    assert document["metadata"]["component"]["version"] == "1.2.3"
    required = {one["ref"]: one.get("dependsOn", []) for one in document["dependencies"]}
    reached, waiting = set(), ["llama2-grpc"]
    while waiting:
        reference = waiting.pop()
        if reference not in reached:
            reached.add(reference)
            waiting += required[reference]
    assert reached == {"llama2-grpc", *(one["bom-ref"] for one in document["components"])}


def test_sbom_has_the_dependencies_of_a_package(tmp_path: Path) -> None:
    """The comments of uv name the packages that require an entry, in one line or several."""
    from tools.audit.sbom import Lock

    path = tmp_path / "test.lock"
    path.write_text(
        "mako==1.0 \\\n    --hash=sha256:aa\n    # via alembic\n"
        "alembic==2.0 \\\n    --hash=sha256:bb\n"
        "    # via\n    #   -c constraints.txt\n    #   llama2-grpc (pyproject.toml)\n"
        "typing-extensions==3.0 \\\n    --hash=sha256:cc\n    # via\n    #   alembic\n    #   mako\n"
    )
    lock = Lock.read(path)
    assert lock.versions == {"mako": "1.0", "alembic": "2.0", "typing-extensions": "3.0"}
    assert lock.dependencies == {
        "llama2-grpc": {"alembic"},
        "alembic": {"mako", "typing-extensions"},
        "mako": {"typing-extensions"},
        "typing-extensions": set(),
    }


def test_unknown_packages_are_not_audited() -> None:
    """If the database knows no package, pip-audit reports no vulnerability; that is not a complete audit."""
    skipped = {"name": "torch", "skip_reason": "not found on PyPI"}
    report = read_report({"dependencies": [skipped]})
    assert (report.complete, report.audited, report.not_audited) == (False, 0, 1)
    assert read_report({"dependencies": [skipped, {"name": "click", "version": "8.0", "vulns": []}]}).complete


def test_vulnerabilities_are_reported() -> None:
    """Each known vulnerability is a line with its package and the versions without it."""
    found = {"id": "PYSEC-1", "fix_versions": ["8.1", "9.0"], "aliases": [], "description": ""}
    open_one = {"id": "PYSEC-2", "fix_versions": [], "aliases": [], "description": ""}
    report = read_report({"dependencies": [{"name": "click", "version": "8.0", "vulns": [found, open_one]}]})
    assert report.vulnerabilities == (
        "click 8.0: PYSEC-1, fixed in 8.1, 9.0",
        "click 8.0: PYSEC-2, fixed in no version",
    )


def test_sbom_of_an_image_has_its_python_and_debian_packages(tmp_path: Path) -> None:
    """The SBOM of an image lists the distributions of the environment and the installed Debian packages."""
    from tools.audit.sbom import bill_of_tree

    packages = tmp_path / "opt/llama2/lib/python3.11/site-packages"
    (packages / "Test_Package-1.5.dist-info").mkdir(parents=True)
    (packages / "Test_Package-1.5.dist-info/METADATA").write_text("Name: Test_Package\nVersion: 1.5\n")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9\nDescription: C\n more\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    document = json.loads(bill_of_tree(tmp_path, "1.2.3"))
    assert document["metadata"]["component"]["type"] == "container"
    assert sorted(one["purl"] for one in document["components"]) == [
        "pkg:deb/debian/libc6@2.36-9?arch=amd64",
        "pkg:pypi/test-package@1.5",
    ]
    assert bill_of_tree(tmp_path, "1.2.3").count(document["serialNumber"]) == 1
