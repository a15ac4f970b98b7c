"""Errors of calls that no server answers: each names the problem and its remedy."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.integration.client.samples import REPLY
from tests.integration.client.twins.twin import KINDS, Twin
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, ConnectionProblem, DeadlineExceeded, Llama2Error, SyncClient, Unavailable
from llama2_client.channel import is_loopback, proxy_variable
from llama2_client.connection_errors import REMEDIES

Kind = type[Client] | type[SyncClient]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the proxy variables of the developer's environment."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def bound_port(*, listening: bool) -> Iterator[str]:
    """Bind a port that refuses connections, or accepts them and never answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if listening:
            unused.listen()
        yield f"127.0.0.1:{unused.getsockname()[1]}"


@contextlib.asynccontextmanager
async def tls_server(authority: Authority, *, mutual: bool = False, name: str = "127.0.0.1") -> AsyncIterator[str]:
    """Run a server with TLS and return its address."""
    certificate, key = authority.pair(name)
    pairs = [(key.read_bytes(), certificate.read_bytes())]
    credentials = grpc.ssl_server_credentials(pairs, authority.root if mutual else None, mutual)
    async with ScriptedServer.running(credentials=credentials) as server:
        yield server.address


async def error_of(kind: Kind, address: str, **options: object) -> Llama2Error:
    """Return the error of a call; one attempt is enough, because the connection fails in the same way each time."""
    async with Twin.connected(kind, address, **{"timeout": 60, "max_attempts": 1, **options}) as twin:
        with pytest.raises(Llama2Error) as caught:
            await twin.call("generate", "Hi")
        whole = caught.value
        with pytest.raises(type(whole)) as streamed:
            await twin.read([], "Hi")
    assert str(streamed.value) == str(whole) == whole.message
    return whole


async def test_every_tls_mistake_has_its_remedy(kind: Kind, tmp_path: Path) -> None:
    """Plain text to TLS, TLS to plain text, another authority, another name, and no client certificate differ."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    async with (
        ScriptedServer.running() as plain,
        tls_server(authority) as tls,
        tls_server(authority, name="llama2.example.com") as named,
        tls_server(authority, mutual=True) as mutual,
    ):
        cases = {
            ConnectionProblem.CLOSED: await error_of(kind, tls),
            ConnectionProblem.NO_TLS: await error_of(kind, plain.address, tls=authority.root),
            ConnectionProblem.UNTRUSTED_CERTIFICATE: await error_of(kind, tls, tls=other.root),
            ConnectionProblem.OTHER_SERVER_NAME: await error_of(kind, named, tls=authority.root),
            ConnectionProblem.CLIENT_CERTIFICATE: await error_of(kind, mutual, tls=authority.root),
        }
    for problem, error in cases.items():
        assert (type(error), error.problem) == (Unavailable, problem)
        assert error.message.endswith(f": {problem.value}; {REMEDIES[problem]}")
    assert len({error.message.partition(": ")[2] for error in cases.values()}) == 5


async def test_the_server_name_is_an_option(kind: Kind, tmp_path: Path) -> None:
    """With `server_name`, a certificate for another name than the address is accepted."""
    authority = Authority(tmp_path)
    async with (
        tls_server(authority, name="llama2.example.com") as address,
        Twin.connected(kind, address, tls=authority.root, server_name="llama2.example.com", timeout=60) as twin,
    ):
        assert await twin.call("generate", "Hi") == REPLY


async def test_a_refused_connection_is_named(kind: Kind) -> None:
    """If nothing listens at the address, the error says so, also if the deadline passes during gRPC's retries."""
    with bound_port(listening=False) as address:
        for options in ({}, {"timeout": 0.5, "max_attempts": 5}):
            error = await error_of(kind, address, **options)
            assert (type(error), error.problem) == (Unavailable, ConnectionProblem.REFUSED)
            expected = f"{address}: {ConnectionProblem.REFUSED.value}; start the server or correct the address"
            assert error.message == expected


async def test_a_silent_address_is_named(kind: Kind) -> None:
    """If an address accepts connections and never answers, the error says so instead of asking for more time."""
    with bound_port(listening=True) as address:
        error = await error_of(kind, address, timeout=0.5)
    assert (type(error), error.problem) == (DeadlineExceeded, ConnectionProblem.NO_ANSWER)
    assert error.message.startswith(f"{address}: nothing answers at this address; ")


async def test_a_slow_server_is_no_connection_problem(twin: Twin, server: ScriptedServer) -> None:
    """If the deadline passes while the server works, the error has no connection problem."""
    server.script_reply("Hi")
    server.script_hang()
    await twin.call("generate", "Hi")
    with pytest.raises(DeadlineExceeded) as caught:
        await twin.call("generate", "Hi", timeout=0.2)
    assert caught.value.problem is None


async def test_an_unknown_name_is_named(kind: Kind) -> None:
    """A host name that cannot be resolved is named as such."""
    error = await error_of(kind, "missing.invalid:50051")
    assert error.problem is ConnectionProblem.NAME_NOT_FOUND


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_loopback_addresses_bypass_proxies(
    twin: Twin, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A call to a server on this machine does not use the proxy of the environment."""
    with bound_port(listening=False) as proxy:
        monkeypatch.setenv(variable, f"http://{proxy}")
        assert await twin.call("generate", "Hi") == REPLY
        async with Twin.connected(type(twin.client), server.address.replace("127.0.0.1", "localhost")) as other:
            assert await other.call("generate", "Hi") == REPLY


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_the_error_names_the_proxy_variable(kind: Kind, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """If the proxy of the environment does not answer, the error names its variable, and not its address."""
    with bound_port(listening=False) as proxy:
        monkeypatch.setenv(variable, f"http://user:s3cret@{proxy}")
        error = await error_of(kind, "llama2.example.com:50051")
    assert error.problem is ConnectionProblem.PROXY
    assert error.message == (
        "llama2.example.com:50051: the proxy does not connect to the server; "
        f"unset the variable {variable}, or add the server's host to no_proxy"
    )


def test_the_proxy_variable_is_the_one_that_grpc_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc_proxy precedes https_proxy and http_proxy; no_grpc_proxy and no_proxy list exceptions."""
    target = "dns:///llama2.example.com:50051"
    assert proxy_variable(target) is None
    monkeypatch.setenv("http_proxy", "http://proxy:80")
    assert proxy_variable(target) == "http_proxy"
    monkeypatch.setenv("https_proxy", "http://proxy:80")
    monkeypatch.setenv("grpc_proxy", "http://proxy:80")
    assert proxy_variable(target) == "grpc_proxy"
    monkeypatch.setenv("no_proxy", "other.example.org, .example.com")
    assert proxy_variable(target) is None
    monkeypatch.setenv("no_grpc_proxy", "other.example.org")
    assert proxy_variable(target) == "grpc_proxy"


@pytest.mark.parametrize(
    ("target", "loopback"),
    [
        ("dns:///localhost:50051", True),
        ("dns:///llama2.localhost:50051", True),
        ("dns:///127.0.0.1:50051", True),
        ("dns:///127.1.2.3:50051", True),
        ("dns:///[::1]:50051", True),
        ("dns:///0.0.0.0:50051", False),
        ("dns://8.8.8.8/localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("ipv6:[::1]:1", True),
        ("unix:/run/llama2.sock", True),
        ("unix:///run/llama2.sock", True),
        ("dns:///llama2.example.com:50051", False),
        ("dns:localhost", True),
        ("dns:///localhost.example.com:50051", False),
    ],
)
def test_loopback_targets_are_found(target: str, loopback: bool) -> None:
    """Names and addresses of this machine are loopback targets in every form that gRPC accepts."""
    assert is_loopback(target) is loopback


def test_every_problem_has_a_remedy() -> None:
    """The table of remedies is complete."""
    assert set(REMEDIES) == set(ConnectionProblem)
    assert len(KINDS) == 2
