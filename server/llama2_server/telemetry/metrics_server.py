"""HTTP server for Prometheus, on a dedicated thread.

prometheus_client's `start_http_server` keeps a thread forever for a client that sends nothing. It also looks up the
listening address in the DNS at startup, and prints a traceback if a client disconnects during a scrape.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from llama2_server.telemetry.errors import TelemetryError

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_SECONDS = 10.0
ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
MAX_THREADS = 8
CLOSE_SECONDS = 1.0
POLL_INTERVAL_SECONDS = 0.1  # upper bound of the time that closing takes


@contextmanager
def metrics_server(registry: CollectorRegistry, listen: str) -> Iterator[str]:
    """Serve the registry's metrics at HOST:PORT for the body of the `with`, which receives the address.

    0.0.0.0 and [::] are all addresses of the machine, IPv6 included if it has IPv6, as for gRPC's ports.

    Raises:
        TelemetryError: the address cannot be listened on.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if host in ALL_ADDRESSES:
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - the operator asks for it
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        server = _Server.of_family(family)((host, int(port)), _Handler)
    except OSError as error:
        raise TelemetryError(f"--metrics-listen: cannot listen on {listen}: {error.strerror}") from error
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, args=(POLL_INTERVAL_SECONDS,), name="metrics", daemon=True)
    thread.start()
    try:
        yield f"{listen.rpartition(':')[0]}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(WSGIRequestHandler):
    """Answers one scrape, with a time limit and without a log line."""

    timeout = IDLE_TIMEOUT_SECONDS  # a client that sends nothing would keep a thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the library's name
        """Log nothing: one record per scrape would hide the other records."""


class _Server(ThreadingWSGIServer):
    """prometheus_client's server without DNS lookups and tracebacks, and with at most MAX_THREADS scrapes.

    A further scrape closes the oldest connection, so that slow clients cannot lock out Prometheus.
    """

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_THREADS)
        self._connections: dict[socket.socket, None] = {}  # in the order of their arrival
        self._lock = threading.Lock()
        super().__init__(*arguments)

    @classmethod
    def of_family(cls, family: socket.AddressFamily) -> type["_Server"]:
        """Return the class for IPv4 or IPv6, because the library reads the family from the class."""
        return type("_Server", (cls,), {"address_family": family})

    def server_bind(self) -> None:
        """Bind, and use the address as the server's name."""
        if self.server_address[0] == "::":  # the system's default may exclude IPv4
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection, as soon as there are fewer than MAX_THREADS."""
        if not self._free.acquire(blocking=False):
            self._close_oldest()
            if not self._free.acquire(timeout=CLOSE_SECONDS):
                self.shutdown_request(request)
                return
        with self._lock:
            self._connections[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the connection on its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(request, None)
            self._free.release()

    def _close_oldest(self) -> None:
        with self._lock, suppress(OSError):
            oldest = next(iter(self._connections), None)
            if oldest is not None:
                del self._connections[oldest]
                oldest.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error at debug only, because clients may disconnect at any time."""
        logger.debug("a scrape failed", exc_info=True)
