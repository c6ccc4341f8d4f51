"""A wire between pyserve and its upstream that keeps what passes and when it is cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

_PACED_BYTES = 512


class TappedConnection:
    """One connection, passed on byte for byte; the answer with a pause after each small piece."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.request = b""
        self.answer = b""
        #: The loop's time when the client closed its side.
        self.client_left_at = asyncio.get_running_loop().create_future()

    async def relay(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Until either side closes; then both are closed."""
        asking = asyncio.create_task(self._relay_request(client[0], upstream[1]))
        answering = asyncio.create_task(self._relay_answer(upstream[0], client[1]))
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
            upstream[1].close()
            client[1].close()
        finally:
            await asyncio.gather(asking, answering, return_exceptions=True)

    async def _relay_request(
        self, client: asyncio.StreamReader, upstream: asyncio.StreamWriter
    ) -> None:
        try:
            while block := await client.read(65536):
                self.request += block
                upstream.write(block)
        finally:
            self.client_left_at.set_result(asyncio.get_running_loop().time())

    async def _relay_answer(
        self, upstream: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        while block := await upstream.read(_PACED_BYTES if self._pause_s else 65536):
            self.answer += block
            client.write(block)
            await client.drain()
            if self._pause_s:
                await asyncio.sleep(self._pause_s)

    def answer_body(self) -> bytes:
        """The answer without its head and its chunk sizes."""
        _, _, rest = self.answer.partition(b"\r\n\r\n")
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body += rest[:length]
            rest = rest[length + 2 :]
        return body


class Tap:
    """What :func:`tap` yields."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connections: list[TappedConnection] = []
        #: Set when there is a connection.
        self.connected = asyncio.Event()

    def find(self, text: str) -> TappedConnection:
        """The one connection whose request holds `text`."""
        (found,) = [c for c in self.connections if text.encode() in c.request]
        return found


@asynccontextmanager
async def tap(upstream_url: str, *, pause_s: float = 0) -> AsyncIterator[Tap]:
    """Listen on a free port for connections to `upstream_url`.

    `pause_s` slows answers down: so long after each 512 bytes.
    """
    upstream = urlsplit(upstream_url)

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = TappedConnection(pause_s)
        tapped.connections.append(connection)
        tapped.connected.set()
        there = await asyncio.open_connection(upstream.hostname, upstream.port)
        await connection.relay((reader, writer), there)

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    tapped = Tap(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server:
        yield tapped
