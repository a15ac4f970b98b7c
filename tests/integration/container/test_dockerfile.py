"""What the Dockerfile promises, read from it."""

import re
import tomllib
from pathlib import Path

import pytest
from tests.integration.container.dockerfile import ROOT, Stage, context, read_stages

from llama2_server.config.settings import Settings

BUILD, LAST = read_stages()


@pytest.mark.parametrize("stage", [BUILD, LAST], ids=["build", "last"])
def test_base_is_pinned_by_digest(stage: Stage) -> None:
    """A tag may be moved to another image; a digest may not."""
    assert re.fullmatch(r"python:[\w.-]+@sha256:[0-9a-f]{64}", stage.base)


def test_both_stages_have_one_python_and_one_debian() -> None:
    """The environment is copied over: it needs the same interpreter and the same C library; the last one is slim."""
    build, last = (stage.base.partition("@")[0] for stage in (BUILD, LAST))
    assert last == build.replace("-bookworm", "-slim-bookworm")


def test_user_is_a_number_and_not_root() -> None:
    """Kubernetes' runAsNonRoot can only judge a number."""
    user, _, group = LAST.one("USER").value.partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_labels_agree_with_the_project() -> None:
    """The labels tell the version of pyproject.toml, its licence, and the base that is used."""
    labels = LAST.one("LABEL").pairs()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert told["version"] == project["version"]
    assert told["licenses"] == project["license"]
    assert f"{told['base.name']}@{told['base.digest']}" == f"docker.io/library/{LAST.base}"


def test_variables_are_settings() -> None:
    """Each LLAMA2_ variable of the image is one that the server knows: an unknown one would do nothing."""
    names = {name.removeprefix("LLAMA2_").lower() for name in LAST.one("ENV").pairs() if name.startswith("LLAMA2_")}
    assert names <= Settings.model_fields.keys()
    assert {"listen", "health_listen", "data_directory"} <= names


def test_all_that_is_written_lies_on_the_volume() -> None:
    """Home, the Hub's cache, the ledger and the working directory are below the one volume."""
    (volume,) = LAST.one("VOLUME").words()
    variables = LAST.one("ENV").pairs()
    places = [variables["HOME"], variables["HF_HOME"], variables["LLAMA2_DATA_DIRECTORY"], LAST.one("WORKDIR").value]
    assert [place for place in places if not Path(place).is_relative_to(volume)] == []


def test_health_command_asks_the_plaintext_port() -> None:
    """HEALTHCHECK runs our own health command on the health port, which speaks no TLS, and ends in time by itself."""
    health = LAST.one("HEALTHCHECK")
    command = health.command()
    port = LAST.one("ENV").pairs()["LLAMA2_HEALTH_LISTEN"].rpartition(":")[2]
    assert (command[0], command[-1]) == ("llama2", "health")
    assert command[command.index("--address") + 1] == f"127.0.0.1:{port}"
    allowed = re.search(r"--timeout=(\d+)s", health.value)
    assert allowed
    assert int(command[command.index("--timeout") + 1]) < int(allowed[1])


def test_builder_is_given_what_is_copied_and_nothing_else() -> None:
    """.dockerignore lets through all that COPY names; no key, no weight and no history of this directory."""
    copied = [words for copy in BUILD.all("COPY") for words in copy.words({"ACCELERATOR": "cpu"})[:-1]]
    assert [name for name in copied if not context(name)] == []
    assert context(".git") + context("tests") + context(".venv") + context("keys.yaml") == []
    server = context("server")
    assert Path("server/llama2_server/demo/model.safetensors") in server
    assert [path for path in [*server, *context("protos")] if "__pycache__" in path.parts or "_pb2" in path.name] == []


def test_unknown_instruction_is_refused(tmp_path: Path) -> None:
    """An instruction that the rehearsal would skip in silence is an error."""
    (tmp_path / "Dockerfile").write_text("FROM python:3.11.16-slim\nONBUILD RUN true\n")
    with pytest.raises(ValueError, match="ONBUILD is not known here"):
        read_stages(tmp_path / "Dockerfile")
