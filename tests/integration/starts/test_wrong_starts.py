"""Starts that cannot succeed: each ends with one line that has the remedy, before torch is imported.

These are processes. The rejected forms of checkpoints have their own table (tests/integration/checkpoints).
"""

import ctypes
import datetime
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.checkpoints import edit_json, only_pickles
from tests.support.processes import card_file, environment
from tests.support.servers.postgres_server import PostgresCluster
from tests.support.servers.redis_server import running_redis
from tools.make_checkpoint import Shape, make_checkpoint

Flags = list[str]
# Prints a line if a start comes to the import of torch.
PROGRAM = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("imports torch", flush=True)
sys.meta_path.insert(0, Finder())
from llama2_server.__main__ import main
main()
"""
LARGE = ["--card", "llama-2-7b-chat-fp16"]
DROP_FROM_BOUNDING_SET, BIND_SERVICE = 24, 10  # prctl(PR_CAPBSET_DROP, CAP_NET_BIND_SERVICE)
# The first port that a process without privileges may use.
UNPRIVILEGED = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


def last_line(data_directory: Path, flags: Flags, prepare: Callable[[], object] | None = None) -> str:
    """Return the only line of a server process that does not start, without the program's name.

    On a busy machine, records that name the current step are before it.
    """
    call = [sys.executable, "-c", PROGRAM, "--data-directory", str(data_directory / "data"), *flags]
    done = subprocess.run(
        call, capture_output=True, text=True, timeout=60, env=environment(), check=False, preexec_fn=prepare
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *steps, line = done.stderr.splitlines()
    assert all(json.loads(step)["event"].startswith("still ") for step in steps), done.stderr
    assert line.startswith("llama2-server: ")
    assert "; " in line or ": must be " in line  # the remedy
    return line.removeprefix("llama2-server: ")


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[str]:
    """A loopback address whose port is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("setting", ["listen", "health-listen", "metrics-listen"])
def test_port_in_use(setting: str, taken: str, tmp_path: Path) -> None:
    """Each of the three ports is bound before anything slow."""
    flags = [f"--{setting}", taken, *(["--listen", "127.0.0.1:0"] if setting != "listen" else [])]
    assert last_line(tmp_path, flags) == (
        f"--{setting}: cannot listen on {taken}; the port is in use: stop the program that uses it, or choose another "
        "port"
    )


def drop_bind_service() -> None:
    """Remove the capability to bind privileged ports from the programs that this process executes."""
    assert ctypes.CDLL(None).prctl(DROP_FROM_BOUNDING_SET, BIND_SERVICE, 0, 0, 0) == 0


@pytest.mark.skipif(UNPRIVILEGED <= 1, reason="this machine has no privileged ports")
def test_privileged_port(tmp_path: Path) -> None:
    """A port below 1024 needs a capability."""
    line = last_line(tmp_path, ["--listen", "127.0.0.1:1"], drop_bind_service)
    assert line == (
        "--listen: cannot listen on 127.0.0.1:1; the port needs privileges: choose a port above 1023, or grant "
        "CAP_NET_BIND_SERVICE"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--listen", "192.0.2.1:5", "--allow-unauthenticated"],
            "--listen: cannot listen on 192.0.2.1:5; this machine",
        ),
        (
            ["--listen", "no-host.invalid:5", "--allow-unauthenticated"],
            "no-host.invalid does not resolve to an address",
        ),
        (["--lisen", "x"], "--lisen: no such option; did you mean --listen?"),
        (["--queue-timeout-seconds", "soon"], "--queue-timeout-seconds: must be a number"),
        (["--card", "no-card"], "--card no-card: cannot be read (No such file or directory); name a file or a shipped"),
        (LARGE, "--weights: this card needs weights; pass a checkpoint directory, a Hub id"),
        (["--weights", "/no/such/checkpoint"], "pass a checkpoint's directory or its Hub id"),
        (["--weights", "/"], "--weights: /config.json: no such file; pass the directory of a Hugging Face"),
        (["--api-keys-file", "/no/keys"], "--api-keys-file: cannot read /no/keys: No such file or directory; "),
        (["--tls-certificate", "/no/c", "--tls-key", "/no/k"], "--tls-certificate: cannot read /no/c: No such file"),
        (["--usage-url", "mysql://here"], "--usage-url: mysql is not supported; use postgresql://"),
        (["--redis-url", "http://here"], "--redis-url: not a valid Redis URL; use redis://"),
        (["--otlp-endpoint", "here:4317"], "--otlp-endpoint: here:4317 is not a valid endpoint; use http://HOST:PORT"),
        (["--data-directory", "/proc/x"], "--data-directory: /proc/x cannot be written: No such file or directory; "),
        (
            ["--usage-max-pending-records", str(10**18 // 512)],
            "MB free, expected at least 1000000000000.0 MB for usage records;",
        ),
        (
            ["--redis-url", "redis://127.0.0.1:1", "--require-stores"],
            "--redis-url: 127.0.0.1:1 does not answer; start it, correct the address, or pass --no-require-stores",
        ),
        (
            ["--usage-url", "postgresql://u:p@127.0.0.1:1/d", "--require-stores"],
            "--usage-url: the usage database does not answer; start it, correct the address, or pass --no-require",
        ),
    ],
)
def test_wrong_setting(flags: Flags, expected: str, tmp_path: Path) -> None:
    """A setting that cannot work."""
    listen = [] if "--listen" in flags else ["--listen", "127.0.0.1:0"]
    assert expected in last_line(tmp_path, [*listen, *flags])


def test_invalid_keys_file(tmp_path: Path) -> None:
    """The line names the entry."""
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n  abc: {account: '42'}\n")
    line = last_line(tmp_path, ["--listen", "127.0.0.1:0", "--api-keys-file", str(file)])
    assert line.startswith(f"--api-keys-file: {file}: keys.abc")


def test_expired_certificate(authority: Authority, tmp_path: Path) -> None:
    """The line names the file."""
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate, key = authority.pair(not_after=yesterday)
    flags = ["--listen", "127.0.0.1:0", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    assert last_line(tmp_path, flags) == f"--tls-certificate: {certificate} has expired; renew it"


def test_wrong_redis_password(tmp_path: Path) -> None:
    """Redis answers, so waiting would not help."""
    with running_redis(tmp_path, password="right") as redis:  # noqa: S106 - of this test
        url = redis.url.replace("right", "wrong")
        line = last_line(tmp_path, ["--listen", "127.0.0.1:0", "--redis-url", url])
        assert line.startswith(f"--redis-url: {redis.address} rejects the connection (")
        assert line.endswith("; correct the user, the password or the database in the URL")
        assert "wrong" not in line.lower().replace("wrongpass", "")


@pytest.mark.parametrize(
    ("setting", "url", "expected"),
    [
        ("redis-url", "redis://{}", "--redis-url: {} does not answer; start it, "),
        ("usage-url", "postgresql://u:p@{}/d", "--usage-url: the usage database does not answer; start it, "),
    ],
)
def test_silent_store(setting: str, url: str, expected: str, taken: str, tmp_path: Path) -> None:
    """A store that accepts connections and never answers is an error, too."""
    flags = ["--listen", "127.0.0.1:0", "--require-stores", f"--{setting}", url.format(taken)]
    assert last_line(tmp_path, flags).startswith(expected.format(taken))


def test_missing_database(postgres: PostgresCluster, tmp_path: Path) -> None:
    """PostgreSQL answers, so waiting would not help."""
    url = f"postgresql://ledger:s3cret@127.0.0.1:{postgres.port}/missing"
    line = last_line(tmp_path, ["--listen", "127.0.0.1:0", "--usage-url", url])
    assert line.startswith("--usage-url: the usage database rejects the connection (")
    assert 'database "missing" does not exist' in line
    assert line.endswith("; correct the URL, or create the database and its user")
    assert "s3cret" not in line


def huge(directory: Path) -> None:
    """Replace the weights by a sparse file of 8 TB with one tensor."""
    rows = 10**9
    entry = {"dtype": "F16", "shape": [rows, 4096], "data_offsets": [0, 2 * 4096 * rows]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * 4096 * rows)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (huge, "needs 6144.0 GB on cpu (6144.0 GB of weights, "),  # 12 bits per weight, if all of them fit
        (huge, " GB are free; free memory, or lower context_length_limit or max_concurrent_requests in the card"),
        (only_pickles, "has only pickle files ("),
        (
            partial(edit_json, name="config.json", max_position_embeddings=512),
            "max_position_embeddings is 512, expected at least 1024; if the model was trained with a longer context",
        ),
        (partial(edit_json, name="config.json", architectures=["Mistral"]), "expected ['LlamaForCausalLM'] of"),
    ],
)
def test_wrong_checkpoint(edit: Callable[[Path], None], expected: str, tmp_path: Path) -> None:
    """The files show that the checkpoint cannot be served."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=1024))
    edit(weights)
    flags = ["--listen", "127.0.0.1:0", "--device", "cpu", "--weights", str(weights)]
    line = last_line(tmp_path, flags)
    assert line.startswith(f"--weights: {weights}")
    assert expected in line


def test_large_kv_cache(tmp_path: Path) -> None:
    """Weights that fit do not help if the KV cache of all slots does not."""
    weights = make_checkpoint(tmp_path / "weights", Shape(context=1024))
    card = card_file(tmp_path, max_concurrent_requests=10**9)
    flags = ["--listen", "127.0.0.1:0", "--device", "cpu", "--card", str(card), "--weights", str(weights)]
    line = last_line(tmp_path, flags)
    assert " GB of KV cache for 1000000000 x 1024 tokens), but only " in line


def test_all_errors_of_a_start_are_reported(taken: str, tmp_path: Path) -> None:
    """One start names everything that is wrong, one line each."""
    flags = ["--listen", taken, "--weights", "/no/such", "--api-keys-file", "/no/keys", "--redis-url", "http://here"]
    call = [sys.executable, "-c", PROGRAM, "--data-directory", str(tmp_path), *flags]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 2
    subjects = [line.split(": ")[1] for line in done.stderr.splitlines() if line.startswith("llama2-server: ")]
    assert subjects == ["--api-keys-file", "--listen", "--weights", "--redis-url"]
    assert done.stdout == ""
