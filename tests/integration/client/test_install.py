"""What the client's own install brings along."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MEGABYTE = 10**6


def base_install() -> set[str]:
    """The names of all that `pip install llama2-grpc` installs, without extras, besides itself."""
    found: set[str] = set()
    waiting = ["llama2-grpc"]
    while waiting:
        for line in metadata.requires(waiting.pop()) or ():
            need = Requirement(line)
            name = str(canonicalize_name(need.name))
            if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
                found.add(name)
                waiting.append(name)
    return found


def test_the_base_install_is_small_and_has_no_torch() -> None:
    """Under 30 MB of dependencies, none of them the server's."""
    names = base_install()
    assert "grpcio" in names
    assert not names & {"torch", "transformers", "pydantic", "sqlalchemy"}
    paths = [Path(str(file.locate())) for name in names for file in metadata.files(name) or ()]
    assert 10 * MEGABYTE < sum(path.stat().st_size for path in paths if path.exists()) < 30 * MEGABYTE
