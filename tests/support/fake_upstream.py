"""An upstream that does as it is told, byte for byte.

A raw TCP server. Every connection takes one request and plays one script: bytes are sent as they
are, an ``asyncio.Event`` is waited for, and the last step may be one of the endings below. What
came in, and when the other side left, is kept for the test to look at.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import orjson

#: Endings. Without one the connection is closed when the script is over.
STALL = "stall"  #: send nothing more, until the other side closes
RESET = "reset"  #: drop the connection with a RST

Step = bytes | str | asyncio.Event

PATIENCE_S = 10.0

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
#: Without a length: only the end of the connection ends the body.
SSE_HEAD_UNTIL_CLOSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def token(text: str) -> bytes:
    """One event of a chat completion."""
    return b"data: " + orjson.dumps({"choices": [{"delta": {"content": text}}]}) + b"\n\n"


def stream(*events: bytes) -> tuple[bytes, ...]:
    """A whole answer: these events, each in a chunk of its own, and a clean end."""
    return (SSE_HEAD, *map(chunk, events), LAST_CHUNK)


def answer(
    status: int, body: bytes | dict[str, object] = b"", *, kind: str = "", **headers: str
) -> bytes:
    """An answer with a length; a dict becomes JSON. Underscores in header names become dashes."""
    if isinstance(body, dict):
        body, kind = orjson.dumps(body), kind or "application/json"
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Length: {len(body)}"]
    if kind:
        lines.append(f"Content-Type: {kind}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Exchange:
    """One request as it came in."""

    method: str = ""
    target: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: Set when the connection is closed; `closed_at` tells when the other side did it, if it did.
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    closed_at: float = 0.0

    async def wait_closed(self) -> float:
        """When the other side closed the connection, on the loop's clock."""
        async with asyncio.timeout(PATIENCE_S):
            await self.closed.wait()
        return self.closed_at


class FakeUpstream:
    """``async with FakeUpstream() as upstream``; give it scripts with :meth:`play`."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self._scripts: list[tuple[Step, ...]] = []
        self._came = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def play(self, *scripts: tuple[Step, ...] | bytes) -> None:
        """The next requests are answered by these, in turn; the last one by all that follow."""
        self._scripts = [(each,) if isinstance(each, bytes) else each for each in scripts]

    async def exchange(self, index: int = 0) -> Exchange:
        """The request with this number, as soon as it is here."""
        async with asyncio.timeout(PATIENCE_S), self._came:
            await self._came.wait_for(lambda: len(self.exchanges) > index)
        return self.exchanges[index]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        watching: asyncio.Task[None] | None = None
        try:
            exchange = await _read_request(reader)
            watching = asyncio.create_task(_watch(reader, exchange))
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            async with self._came:
                self.exchanges.append(exchange)
                self._came.notify_all()
            await _play(script, writer, exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side left
        finally:
            if watching is not None:
                watching.cancel()
                exchange.closed.set()
            # After what is still to be sent, or at once if a RST was asked for.
            writer.close()


async def _read_request(reader: asyncio.StreamReader) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.splitlines()
    exchange = Exchange(*first.split(" ")[:2])
    exchange.headers = {
        name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines if x)
    }
    if "content-length" in exchange.headers:
        exchange.body = await reader.readexactly(int(exchange.headers["content-length"]))
    elif exchange.headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            exchange.body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    return exchange


async def _watch(reader: asyncio.StreamReader, exchange: Exchange) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass
    exchange.closed_at = asyncio.get_running_loop().time()
    exchange.closed.set()


async def _play(script: tuple[Step, ...], writer: asyncio.StreamWriter, exchange: Exchange) -> None:
    for step in script:
        if isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
        elif step == STALL:
            await exchange.closed.wait()
        elif step == RESET:
            connection: socket.socket = writer.get_extra_info("socket")
            linger_for_0_s = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_0_s)
            writer.transport.abort()
