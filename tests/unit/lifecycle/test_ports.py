"""Ports that are held from the checks until the services listen on them."""

import socket
from contextlib import suppress

import pytest
from tests.support.processes import free_port

from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.lifecycle.checks.ports import HeldPorts


def held(listen: str) -> HeldPorts:
    """Hold the port of the services."""
    return HeldPorts.of(Settings.model_validate({"listen": listen}))


def test_a_held_port_is_taken_and_refuses_clients() -> None:
    """Another server cannot listen on it, although it shares ports with old connections; clients do not wait."""
    port = free_port()
    ports = held(f"127.0.0.1:{port}")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with pytest.raises(ConfigurationError, match="the port is in use"):
        held(f"127.0.0.1:{port}")
    ports.release("--listen")
    socket.create_server(("127.0.0.1", port)).close()
    ports.release("--listen")  # a second release changes nothing


def test_connections_of_an_old_server_do_not_occupy_the_port() -> None:
    """After a restart, connections that the old server closed remain for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as client:
            server_side, _ = listener.accept()
            server_side.close()  # the side that closes first keeps the connection in TIME_WAIT
            client.recv(1)
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(address)
    held(f"127.0.0.1:{address[1]}").release_all()


def test_each_address_of_a_name_must_be_free() -> None:
    """Localhost has up to two addresses; gRPC alone would listen on the free one only."""
    families = {family for family, *_ in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    for family in families:
        with suppress(OSError), socket.create_server(("localhost", 0), family=family) as taken:
            listen = f"localhost:{taken.getsockname()[1]}"
            with pytest.raises(ConfigurationError, match="the port is in use"):
                held(listen)
