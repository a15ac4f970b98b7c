"""The instructions of the Dockerfile and the files of .dockerignore."""

import re
import tomllib
from pathlib import Path

import pytest
from tests.integration.container.dockerfile import ROOT, Stage, context, read_stages

from llama2_server.config.settings import Settings

BUILD, LAST = read_stages()


@pytest.mark.parametrize("stage", [BUILD, LAST], ids=["build", "last"])
def test_base_is_pinned_by_digest(stage: Stage) -> None:
    """A tag can move to another image; a digest cannot."""
    assert re.fullmatch(r"python:[\w.-]+@sha256:[0-9a-f]{64}", stage.base)


def test_both_stages_have_the_same_python_and_debian() -> None:
    """The copied environment needs the same interpreter and C library; the last stage is slim."""
    build, last = (stage.base.partition("@")[0] for stage in (BUILD, LAST))
    assert last == build.replace("-bookworm", "-slim-bookworm")


def test_user_is_a_number_and_not_root() -> None:
    """Kubernetes' runAsNonRoot requires a numeric user."""
    user, _, group = LAST.one("USER").value.partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_labels_agree_with_the_project() -> None:
    """The labels have the version and license of pyproject.toml, and the base image of the last stage."""
    labels = LAST.one("LABEL").pairs()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    actual = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert actual["version"] == project["version"]
    assert actual["licenses"] == project["license"]
    assert f"{actual['base.name']}@{actual['base.digest']}" == f"docker.io/library/{LAST.base}"


def test_variables_are_settings() -> None:
    """Each LLAMA2_ variable of the image is a setting of the server."""
    names = {name.removeprefix("LLAMA2_").lower() for name in LAST.one("ENV").pairs() if name.startswith("LLAMA2_")}
    assert names <= Settings.model_fields.keys()
    assert {"listen", "health_listen", "data_directory"} <= names


def test_written_directories_are_on_the_volume() -> None:
    """Home, the Hub's cache, the ledger and the working directory are on the volume."""
    (volume,) = LAST.one("VOLUME").words()
    variables = LAST.one("ENV").pairs()
    directories = [
        variables["HOME"],
        variables["HF_HOME"],
        variables["LLAMA2_DATA_DIRECTORY"],
        LAST.one("WORKDIR").value,
    ]
    assert [path for path in directories if not Path(path).is_relative_to(volume)] == []


def test_health_command_uses_the_plaintext_port() -> None:
    """HEALTHCHECK runs `llama2 health` on the plaintext health port, with a shorter timeout than Docker's."""
    health = LAST.one("HEALTHCHECK")
    command = health.command()
    port = LAST.one("ENV").pairs()["LLAMA2_HEALTH_LISTEN"].rpartition(":")[2]
    assert (command[0], command[-1]) == ("llama2", "health")
    assert command[command.index("--address") + 1] == f"127.0.0.1:{port}"
    docker_timeout = re.search(r"--timeout=(\d+)s", health.value)
    assert docker_timeout
    assert int(command[command.index("--timeout") + 1]) < int(docker_timeout[1])


def test_the_build_context_has_the_copied_files_only() -> None:
    """The context has the files of COPY instructions, without keys, weights and the history of the repository."""
    copied = [words for copy in BUILD.all("COPY") for words in copy.words({"ACCELERATOR": "cpu"})[:-1]]
    assert [name for name in copied if not context(name)] == []
    assert context(".git") + context("tests") + context(".venv") + context("keys.yaml") == []
    server = context("server")
    assert Path("server/llama2_server/demo/model.safetensors") in server
    assert [path for path in [*server, *context("protos")] if "__pycache__" in path.parts or "_pb2" in path.name] == []


def test_unknown_instruction_is_rejected(tmp_path: Path) -> None:
    """An instruction that the reader does not know is an error."""
    (tmp_path / "Dockerfile").write_text("FROM python:3.11.16-slim\nONBUILD RUN true\n")
    with pytest.raises(ValueError, match="ONBUILD is not known here"):
        read_stages(tmp_path / "Dockerfile")
