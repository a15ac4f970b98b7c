"""A DNS server for tests: one name with several addresses, like a headless Kubernetes service."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dnslib import QTYPE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

NAME = "llama2-headless.test"


class NameServer(BaseResolver):  # type: ignore[misc]  # the library has no types
    """A resolver of `NAME`; `addresses` may change at any time, and `lookup` replaces them at each query."""

    def __init__(self, addresses: Sequence[str], lookup: Callable[[], Sequence[str]] | None = None) -> None:
        self.addresses = list(addresses)
        self._lookup = lookup
        self.port = 0

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        """Return the reply to a query: the addresses, with a time to live of 0."""
        reply = request.reply()
        if self._lookup is not None:
            self.addresses = list(self._lookup())
        if request.q.qtype == QTYPE.A and request.q.qname.matchGlob(f"{NAME}."):
            for address in self.addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=0))
        return reply

    def target(self, port: int) -> str:
        """Return the name as a gRPC target that this server resolves.

        In a cluster, the part between the slashes is empty: dns:///NAME:PORT.
        """
        return f"dns://127.0.0.1:{self.port}/{NAME}:{port}"


@contextmanager
def running_name_server(*addresses: str, lookup: Callable[[], Sequence[str]] | None = None) -> Iterator[NameServer]:
    """Run a name server on a free loopback port."""
    names = NameServer(addresses, lookup)
    server = DNSServer(names, address="127.0.0.1", port=0, logger=DNSLogger(log="-request,-reply,-truncated,-data"))
    names.port = server.server.server_address[1]
    server.start_thread()
    try:
        yield names
    finally:
        server.stop()
        server.server.server_close()
