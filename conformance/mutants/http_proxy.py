"""An HTTP proxy in front of the JSON gateway that applies one mutant."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import httpx2

from conformance.mutants.behavior import Exchange, Mutant

MAX_HEADER_BYTES = 64 * 1024


class HttpProxy:
    """Relays one request per connection; `mutant` is replaced before each run of a case."""

    def __init__(self, url: str) -> None:
        self.mutant: Mutant | None = None
        self._client = httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            exchange = await _read_request(reader)
            if self.mutant is not None and self.mutant.http_request is not None:
                self.mutant.http_request(exchange)
            if not exchange.status:
                await self._forward(exchange)
            if self.mutant is not None and self.mutant.http_response is not None:
                self.mutant.http_response(exchange)
            writer.write(_response(exchange))
            await writer.drain()
        finally:
            writer.close()

    async def _forward(self, exchange: Exchange) -> None:
        skipped = {"host", "content-length", "connection", "accept-encoding"}
        headers = {key: value for key, value in exchange.headers.items() if key not in skipped}
        body = exchange.body.encode("utf-8", "surrogatepass")
        response = await self._client.request(exchange.method, exchange.path, content=body, headers=headers)
        exchange.status, exchange.response_body = response.status_code, response.text
        kept = ("content-type", "retry-after", "allow")
        exchange.response_headers = {key: response.headers[key] for key in kept if key in response.headers}

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


async def _read_request(reader: asyncio.StreamReader) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Exchange(method, path, headers, body.decode("utf-8", "surrogatepass"))


def _response(exchange: Exchange) -> bytes:
    body = exchange.response_body.encode()
    headers = exchange.response_headers | {"content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {exchange.status} {HTTPStatus(exchange.status).phrase}"]
    return "\r\n".join([*lines, *(f"{key}: {value}" for key, value in headers.items()), "", ""]).encode() + body


@asynccontextmanager
async def running_http_proxy(proxy: HttpProxy) -> AsyncIterator[str]:
    """Serve the proxy on a free loopback port, and yield its URL."""
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0, limit=MAX_HEADER_BYTES)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    await proxy.close()
