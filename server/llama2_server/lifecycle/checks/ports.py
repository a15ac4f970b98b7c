"""Check the addresses at startup, and hold their ports until the services listen on them.

A held port is bound and does not listen: clients are refused, and other programs cannot take the port.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Self

from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError

REMEDIES = {
    errno.EADDRINUSE: "the port is in use: stop the program that uses it, or choose another port",
    errno.EACCES: "the port needs privileges: choose a port above 1023, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine does not have the address: use one of its addresses, such as 127.0.0.1",
}
# Errors of an address that a name resolves to and the machine does not have, such as ::1 without IPv6.
ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class HeldPorts:
    """Bound sockets by the flag of their address. `release` closes them before the service binds the same address."""

    def __init__(self) -> None:
        self._sockets: dict[str, ExitStack] = {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Bind the ports that the settings name; port 0 is checked and not held.

        Raises:
            ConfigurationError: an address does not resolve, or its port cannot be bound.
        """
        held = cls()
        try:
            for flag, listen in _addresses(settings):
                held._hold(flag, listen)
        except ConfigurationError:
            held.release_all()
            raise
        return held

    def release(self, flag: str) -> None:
        """Close the sockets of an address; no-op if none are held."""
        if flag in self._sockets:
            self._sockets.pop(flag).close()

    def release_all(self) -> None:
        """Close all sockets."""
        for flag in list(self._sockets):
            self.release(flag)

    def _hold(self, flag: str, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        sockets = self._sockets[flag] = ExitStack()
        bound, absent = 0, None
        for family, address in _resolve(flag, listen, host.strip("[]"), int(port)):
            try:
                sockets.enter_context(_bound_socket(family, address))
                bound += 1
            except OSError as error:
                if error.errno not in ABSENT:
                    raise _error(flag, listen, error) from error
                absent = error
        if not bound and absent is not None:
            raise _error(flag, listen, absent) from absent
        if port == "0":
            self.release(flag)


def _addresses(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "--listen", settings.listen
    if settings.health_listen is not None:
        yield "--health-listen", settings.health_listen
    if settings.metrics_listen is not None:
        yield "--metrics-listen", settings.metrics_listen


def _resolve(flag: str, listen: str, host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(
            f"{flag}: cannot listen on {listen}; {host} does not resolve to an address ({error.strerror}): "
            "use an address of this machine, such as 127.0.0.1"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


def _bound_socket(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    """Return a socket that is bound to the address and does not listen; raises OSError."""
    with ExitStack() as stack:
        holder = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        if family == socket.AF_INET6:
            with suppress(OSError):  # gRPC listens for IPv4 on [::], too
                holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            holder.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Connections of a previous server occupy the port for a minute. With this option, only another program's
            # socket does; the port is then weakly held, because a program with the same option can take it.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
        stack.pop_all()
        return holder


def _error(flag: str, listen: str, error: OSError) -> ConfigurationError:
    number = error.errno or 0
    remedy = REMEDIES.get(number, f"{os.strerror(number)}: choose another address")
    return ConfigurationError(f"{flag}: cannot listen on {listen}; {remedy}")
