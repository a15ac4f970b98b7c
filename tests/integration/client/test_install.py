"""The dependencies of the base install, which is the client."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MEGABYTE = 10**6


def base_install() -> set[str]:
    """Return the distributions that `pip install .` installs in addition, without extras."""
    found: set[str] = set()
    pending = ["llama2-grpc"]
    while pending:
        for line in metadata.requires(pending.pop()) or ():
            requirement = Requirement(line)
            name = str(canonicalize_name(requirement.name))
            if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found.add(name)
                pending.append(name)
    return found


def test_the_base_install_is_small_and_has_no_torch() -> None:
    """The dependencies take less than 30 MB and include no dependency of the server."""
    names = base_install()
    assert "grpcio" in names
    assert not names & {"torch", "transformers", "pydantic", "sqlalchemy"}
    paths = [Path(str(file.locate())) for name in names for file in metadata.files(name) or ()]
    assert 10 * MEGABYTE < sum(path.stat().st_size for path in paths if path.exists()) < 30 * MEGABYTE
