"""Every grpcurl and buf curl command of README, docs and start message, run by the real programs on a real server."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from tests.support.processes import environment, server
from tests.support.repository import ROOT

from llama2_server.admission.keys.keys_file import new_key

BIN = Path(sys.executable).parent
MODES = ("plain", "key", "tls", "mtls")
DOCUMENTED = "127.0.0.1:50051"
# For each command, the first match gives the exit code and the words of its output. grpcurl's code is 64 + the status.
EXPECTED: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    (r" list$", 0, ("llama2.v1.TextGenerationService", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection")),
    (r"--list-methods", 0, ("llama2.v1.TextGenerationService/Generate", "grpc.health.v1.Health/List")),
    (r"describe \S+\.Generate$", 0, ("// Generates a reply and returns it in one message.", "rpc Generate (")),
    (r"describe \S+\.ErrorReason$", 0, ("// RESOURCE_EXHAUSTED with RetryInfo.", "ERROR_REASON_QUEUE_FULL")),
    (r"Health/List$", 0, ('"liveness"', '"llama2.v1.ModelService"', '"SERVING"')),
    (
        r'"top_p": 2',
        67,
        ("Code: InvalidArgument", '"reason":"INVALID_REQUEST"', '"field":"top_p"', "must be in (0, 1]"),
    ),
    (r"/GenerateStream$", 0, ("fox", '"finishReason"')),
    (r"/Generate$", 0, ('"response"', '"finishReason"')),
    (r"/GetUsage$", 0, ('"account": "42"', '"maxRequestsPerMin": 5')),
    (r"/GetModelCard$", 0, ("@demo/storyteller",)),
    (r"/GetModelCard \| grep", 0, ('"fingerprintInputs"', '"kernels"', '"value": "native"')),
)


@dataclass(frozen=True)
class Running:
    """A server, and what a client's shell needs to call it."""

    mode: str
    address: str
    banner: list[str]
    folder: Path
    """The certificates, under their names in docs/networking.md."""
    key: str

    def run(self, command: str, folder: Path, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a shell in a working directory."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment(PATH=path, **variables),
            input=typed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module", params=MODES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server in each mode; its port is the documented one, if it is free."""
    mode = request.param
    folder = tmp_path_factory.mktemp(mode)
    key, line = new_key("42")
    (folder / "keys.yaml").write_text(f"keys:\n  {line}\n")
    flags = [*key_flags(mode, folder), *tls_flags(mode, folder)]
    host = "0.0.0.0" if mode in {"key", "tls"} else "127.0.0.1"  # noqa: S104  # with keys, any client may connect
    with started(folder, flags, host) as (process, address):
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        banner = [line.strip() for line in iter(process.stdout.readline, "\n")]
        yield Running(mode, f"127.0.0.1:{address.rpartition(':')[2]}", banner, folder, key)


@contextmanager
def started(folder: Path, flags: list[str], host: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with ExitStack() as stack:
        if is_free(50051):
            try:
                yield stack.enter_context(server(folder, *flags, listen=f"{host}:50051"))
                return
            except AssertionError:  # another process was faster
                pass
        yield stack.enter_context(server(folder, *flags, listen=f"{host}:0"))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def key_flags(mode: str, folder: Path) -> list[str]:
    return ["--api-keys-file", str(folder / "keys.yaml")] if mode in {"key", "tls"} else []


def tls_flags(mode: str, folder: Path) -> list[str]:
    """Write the certificates of server and client; return the server's flags."""
    if mode not in {"tls", "mtls"}:
        return []
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    for name, certificate in (
        ("tls", authority.issue_cert("localhost", "127.0.0.1")),
        ("client", authority.issue_cert("c")),
    ):
        (folder / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
    flags = ["--tls-certificate", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")]
    return [*flags, "--tls-client-ca", str(folder / "ca.crt")] if mode == "mtls" else flags


def documented() -> list[str]:
    """Return the commands of README and docs; a backslash continues a line."""
    commands = []
    for page in (ROOT / "README.md", ROOT / "examples/clients/README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"(?ms)^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8")):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            commands += [line.strip() for line in lines if re.match(r"\s*(grpcurl|buf curl) ", line)]
    return commands


def mode_of(command: str) -> str:
    """Return the mode of the server that a command is for."""
    if re.search(r" --?cert ", command):
        return "mtls"
    if re.search(r" --?cacert ", command):
        return "tls"
    return "key" if "LLAMA2_API_KEY" in command else "plain"


def test_the_documentation_has_commands_for_every_mode() -> None:
    """Both programs, a list, a description, a call, an error with details, a key, TLS and mutual TLS."""
    commands = documented()
    assert {mode_of(command) for command in commands} == set(MODES)
    assert {command.split()[0] for command in commands} == {"grpcurl", "buf"}
    for pattern, _, _ in EXPECTED[:1] + EXPECTED[2:]:
        assert any(re.search(pattern, command) for command in commands), pattern


def test_documented_commands_work(running: Running) -> None:
    """Each command runs verbatim; HOST becomes a name of the certificate, and the port changes only if it is in use."""
    host = f"localhost:{running.address.rpartition(':')[2]}"
    for command in (command for command in documented() if mode_of(command) == running.mode):
        run = command.replace("HOST:50051", host).replace(DOCUMENTED, running.address)
        check(command, running.run(run, running.folder, LLAMA2_API_KEY=running.key))


def test_the_start_messages_commands_work(running: Running) -> None:
    """Each command runs verbatim in the server's directory, after the placeholders in capitals are replaced."""
    *exports, generate, chat, grpcurl = [fill_in(command, running) for command in running.banner]
    assert bool(exports) is (running.mode in {"key", "tls"})
    for command, typed in ((generate, ""), (chat, "Tell me a story.\n")):
        done = running.run("\n".join([*exports, command]), Path.cwd(), typed)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) > 20
    check(grpcurl, running.run("\n".join([*exports, grpcurl]), Path.cwd()))


def fill_in(command: str, running: Running) -> str:
    placeholders = {
        "CA.pem": str(running.folder / "ca.crt"),
        "CLIENT.pem": str(running.folder / "client.crt"),
        "CLIENT.key": str(running.folder / "client.key"),
        "API_KEY=KEY": f"API_KEY={running.key}",
        "HOST:": "localhost:",
    }
    for placeholder, value in placeholders.items():
        command = command.replace(placeholder, value)
    return command


def check(command: str, done: subprocess.CompletedProcess[str]) -> None:
    """Compare exit code and output with the table, in which every command must be."""
    code, words = next((code, words) for pattern, code, words in EXPECTED if re.search(pattern, command))
    output = done.stdout + done.stderr
    output += "".join(re.findall(r'"response": "(.*)"', output))  # two messages can share a word
    assert (done.returncode, [word for word in words if word not in output]) == (code, []), f"{command}\n{output}"
