"""The Dockerfile's steps and the container's entry point, run without a Docker engine."""

import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.integration.container.dockerfile import context
from tests.integration.container.rehearsal import Container, Image, StepError, built, missing, running

REASON = missing()
# The steps install torch and all other dependencies, which takes minutes on a busy machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(REASON is not None, reason=f"NOT TESTED: {REASON}")]

TOOLS = re.compile(r"(g?cc|g\+\+|c\+\+|clang(\+\+)?|ld|as|make|cmake|nvcc|rustc|go|pip\d*(\.\d+)?|uv)(-\d+)?")
STORY = "Tell me a story about a fox who lives by the sea."


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The CPU image, with packages from the indexes of this machine's pip."""
    index = os.environ.get("TORCH_INDEX", "https://pypi.org/simple")
    try:
        with built(tmp_path_factory.mktemp("image"), {"TORCH_INDEX": index}) as image:
            yield image
    except StepError as error:
        if "No matching distribution found for torch" not in str(error):
            raise
        pytest.skip("NOT TESTED: pip finds no CPU build of torch; set TORCH_INDEX to an index that has it")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Path:
    """A new volume with the owner and mode of its mount point, like a Docker volume."""
    (mounted_at,) = image.stage.one("VOLUME").words()
    mount_point = image.layer.path_of(mounted_at).stat()
    directory = tmp_path_factory.mktemp("volume")
    os.chown(directory, mount_point.st_uid, mount_point.st_gid)
    directory.chmod(mount_point.st_mode)
    return directory


@pytest.fixture(scope="module")
def container(image: Image, volume: Path) -> Iterator[Container]:
    """A container that serves the demo model without authentication."""
    with running(image, volume, variables={"LLAMA2_ALLOW_UNAUTHENTICATED": "true"}) as container:
        yield container


def test_requires_api_keys_by_default(image: Image, volume: Path) -> None:
    """Without API keys and LLAMA2_ALLOW_UNAUTHENTICATED, the container exits immediately, with a fix in one line."""
    done = subprocess.run(image.entry(volume), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there are no API keys" in done.stderr.splitlines()[-1]


def test_image_has_no_build_tools_and_no_cache(image: Image) -> None:
    """The image adds the environment and /data to its base: no compiler, no pip, no wheel, no cache."""
    tree, added = image.layer.tree, image.layer.added()
    assert {path.parts[0] for path in added} == {"opt", "data"}
    programs = {path for path in added if (tree / path).is_file() and os.access(tree / path, os.X_OK)}
    assert {path.name for path in programs if TOOLS.fullmatch(path.name)} == set()
    assert {path.name for path in added if path.suffix == ".whl" or path.name == ".cache"} == set()


def test_only_root_can_change_the_image(image: Image) -> None:
    """Root owns all of the image except the volume, and other users cannot write to it."""
    paths = [image.layer.tree / path for path in image.layer.added() if path.parts[0] != "data"]
    assert {path for path in paths if path.lstat().st_uid != 0} == set()
    assert {path for path in paths if not path.is_symlink() and path.stat().st_mode & 0o022} == set()


def test_bytecode_is_compiled_in_the_build(image: Image) -> None:
    """A read-only environment cannot store bytecode, so the image has it for the package and its dependencies."""
    packages = Path("opt/llama2/lib/python3.11/site-packages")
    bytecode = (path for path in image.layer.added() if path.suffix == ".pyc")
    compiled = {path.parent.parent / path.name.partition(".")[0] for path in bytecode}
    assert {
        packages / "llama2_server/app",
        packages / "llama2_client/aio/client",
        packages / "torch/__init__",
    } <= compiled


def test_native_code_is_compiled_in_the_build(image: Image) -> None:
    """The build stage has a compiler, so the image has a library for each C++ source."""
    packages = Path("opt/llama2/lib/python3.11/site-packages")
    sources = [path.relative_to("server") for path in context("server") if path.suffix == ".cpp"]
    assert {packages / source.with_suffix(".so") for source in sources} <= image.layer.added()


def test_health_command_succeeds(container: Container) -> None:
    """The HEALTHCHECK of the image succeeds on the health port."""
    done = container.exec(*container.image.stage.one("HEALTHCHECK").command())
    assert (done.returncode, done.stderr) == (0, "")
    assert "SERVING" in done.stdout


def test_generates(container: Container, volume: Path) -> None:
    """`llama2 generate` in the container returns a story, and the ledger on the volume records it."""
    done = container.exec("llama2", "generate", "--temperature", "0", STORY)
    assert "fox" in done.stdout, done.stderr
    recorded = container.exec("llama2", "usage", "--json")
    assert '"requests"' in recorded.stdout, recorded.stderr
    with closing(sqlite3.connect(volume / "usage.db")) as ledger:
        assert ledger.execute("SELECT count(*) FROM usage_records").fetchone()[0] >= 1


def test_runs_without_privileges(container: Container) -> None:
    """The service is process number 1 with the Dockerfile's user, has no capabilities and cannot gain any."""
    user, _, group = container.image.stage.one("USER").value.partition(":")
    assert container.status("NSpid").split()[-1] == "1"
    assert container.status("Uid").split() == [user] * 4
    assert container.status("Gid").split() == [group] * 4
    assert container.status("Groups") == ""
    assert {int(container.status(f"Cap{kind}"), 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert container.status("NoNewPrivs") == "1"


@pytest.mark.parametrize("directory", ["/", "/tmp", "/opt/llama2", "/opt/llama2/lib/python3.11/site-packages"])  # noqa: S108
def test_root_is_read_only(container: Container, directory: str) -> None:
    """Only the volume is writable, and the service still runs."""
    done = container.exec("touch", f"{directory}/written")
    assert "Read-only file system" in done.stderr
    assert container.exec("touch", "/data/written").returncode == 0


def test_drains_and_exits_on_its_stop_signal(image: Image, tmp_path: Path) -> None:
    """Process number 1 drains and exits with 0 on the STOPSIGNAL; it would ignore an unhandled signal."""
    tmp_path.chmod(0o777)
    with running(image, tmp_path, variables={"LLAMA2_ALLOW_UNAUTHENTICATED": "true"}) as container:
        os.kill(container.first, signal.Signals[image.stage.one("STOPSIGNAL").value])
        assert container.outer.wait(timeout=60) == 0
