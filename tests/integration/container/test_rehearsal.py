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
from tests.integration.checkpoints.served_forms import PUBLISHED_GENERATION, made, only_tokenizer_json, write_json
from tests.integration.container.dockerfile import context
from tests.integration.container.rehearsal import Container, Image, StepError, built, missing, running
from tools.container.prune import RULES, STRIPPED, size

REASON = missing()
# The steps install torch and all other dependencies, which takes minutes on a busy machine.
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(REASON is not None, reason=f"NOT TESTED: {REASON}")]

TOOLS = re.compile(r"(g?cc|g\+\+|c\+\+|clang(\+\+)?|ld|as|make|cmake|nvcc|rustc|go|pip\d*(\.\d+)?|uv)(-\d+)?")
PACKAGES = Path("opt/llama2/lib/python3.11/site-packages")
# The image must have less than 1.0 GB, and Debian's slim base with Python 3.11 has about 0.13 GB.
ENVIRONMENT_LIMIT_BYTES = 850_000_000
# Modules that need Triton, or that only Alembic and `python -m` run, are not imported.
IMPORT_ALL = """
import importlib, pkgutil, llama2_client, llama2_server
for package in (llama2_client, llama2_server):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith((".__main__", ".migrations.env", ".native.decode")):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
print("all modules")
"""
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
    bytecode = (path for path in image.layer.added() if path.suffix == ".pyc")
    compiled = {path.parent.parent / path.name.partition(".")[0] for path in bytecode}
    assert {
        PACKAGES / "llama2_server/app",
        PACKAGES / "llama2_client/aio/client",
        PACKAGES / "torch/__init__",
    } <= compiled


def test_native_code_is_compiled_in_the_build(image: Image) -> None:
    """The build stage has a compiler, so the image has a library for each C++ source."""
    sources = [path.relative_to("server") for path in context("server") if path.suffix == ".cpp"]
    assert {PACKAGES / source.with_suffix(".so") for source in sources} <= image.layer.added()


def test_image_has_no_files_that_the_server_never_loads(image: Image) -> None:
    """The build has removed what tools/container/prune.py lists, and the image stays under 1.0 GB with its base."""
    packages = image.layer.path_of("/") / PACKAGES
    assert [path for rule in RULES for path in rule.paths(packages)] == []
    for name in STRIPPED:
        sections = subprocess.run(
            ["readelf", "-SW", packages / name], capture_output=True, text=True, check=True
        ).stdout
        assert ".symtab" not in sections
        assert ".dynsym" in sections
    assert size(image.layer.path_of("/opt/llama2")) < ENVIRONMENT_LIMIT_BYTES


def test_every_module_of_the_server_loads(container: Container) -> None:
    """No module of the server or the client needs a file that the build has removed."""
    done = container.exec("python", "-c", IMPORT_ALL)
    assert done.stdout == "all modules\n", done.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("llama2-server weights check /{packages}/llama2_server/demo", "of the weights fit in 12 bits"),
        ("llama2-server keys new 42 --api-keys-file /data/keys.yaml", "l2_"),
        ("llama2-server keys list --api-keys-file /data/keys.yaml", "42"),
        ("llama2-server usage", "neurons"),
        ("llama2-server settings", "data_directory"),
        ("llama2-server receipts --help", "receipts"),
    ],
)
def test_commands_run(container: Container, command: str, expected: str) -> None:
    """The commands of the server work with the files that remain."""
    done = container.exec("env", "LLAMA2_ALLOW_UNAUTHENTICATED=true", *command.format(packages=PACKAGES).split())
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_serves_a_downloaded_checkpoint(image: Image, volume: Path, kernels: str) -> None:
    """A checkpoint with transformers' files and a tokenizer.json is served with native kernels and with torch's."""
    checkpoint = volume / f"checkpoint-{kernels}"
    made(only_tokenizer_json(), write_json("generation_config.json", PUBLISHED_GENERATION))(checkpoint)
    for file in checkpoint.iterdir():
        file.chmod(0o644)  # the container's user is not the owner
    variables = {
        "LLAMA2_ALLOW_UNAUTHENTICATED": "true",
        "LLAMA2_WEIGHTS": f"/data/{checkpoint.name}",
        "LLAMA2_CPU_KERNELS": kernels,
    }
    with running(image, volume, variables=variables) as container:
        done = container.exec("llama2", "generate", "--temperature", "0", "--max-tokens", "8", STORY)
        assert done.returncode == 0, done.stderr


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
