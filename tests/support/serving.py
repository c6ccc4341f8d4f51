"""pyserve behind a real socket, and a client that sees every byte of an answer.

The server runs under ``web.AppRunner``, as ``pyserve serve`` does: aiohttp's test server treats
clients that leave differently.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

import pyserve
from pyserve.routes.context import CONTEXT

PATIENCE_S = 10.0

Headers = dict[str, str] | Iterable[tuple[str, str | bytes]]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nothing announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@dataclass
class Response:
    """An answer whose head has come. ``end`` tells how the body ended, once it has:

    ``clean`` (its last chunk or its whole length was there), ``closed`` (FIN) or ``reset`` (RST).
    """

    connection: Connection
    status: int
    head: bytes
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    end: str | None = None
    _left: int | None = None  # bytes still to come, of the body or of its chunk
    _chunked: bool = False

    def json(self) -> Any:
        """The body, parsed."""
        return orjson.loads(bytes(self.body))

    @property
    def error(self) -> dict[str, Any]:
        """The error that the body tells, and nothing else."""
        parsed = self.json()
        assert list(parsed) == ["error"]
        return parsed["error"]

    async def read_to_end(self) -> bytes:
        """The whole body; ``end`` tells how it ended."""
        while self.end is None:
            await self.read_more()
        return bytes(self.body)

    async def whole(self) -> Response:
        """The answer, read to its end, on a connection that is not needed any more."""
        await self.read_to_end()
        self.connection.close()
        return self

    async def read_until(self, text: bytes) -> bytes:
        """The body up to and with `text`, or more of it."""
        while text not in self.body:
            assert self.end is None, f"{text!r} is not in {bytes(self.body)!r}"
            await self.read_more()
        return bytes(self.body)

    async def read_more(self) -> None:
        """Wait for the next bytes of the body, or its end."""
        if self._left == 0:
            await self._next_chunk()
            return
        if not self.connection.buffer and not await self.connection.fill():
            self.end = self.connection.end
            return
        taken = self.connection.take(self._left)
        self.body += taken
        if self._left is not None:
            self._left -= len(taken)
            if self._left == 0 and not self._chunked:
                self.end = "clean"

    async def _next_chunk(self) -> None:
        size = await self.connection.line(skip_blank=bool(self.body))
        if size is None:
            self.end = self.connection.end
            return
        self._left = int(size, 16)
        if self._left == 0:
            assert await self.connection.line() == b""
            self.end = "clean"

    def start_body(self, method: str) -> None:
        """What the head says about the body."""
        if method == "HEAD" or self.status in (204, 304):
            self.end = "clean"
        elif self.headers.get("transfer-encoding") == "chunked":
            self._chunked, self._left = True, 0
        elif "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
            self.end = "clean" if self._left == 0 else None


class Connection:
    """A client's connection, bare."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.buffer = bytearray()
        self.end: str | None = None

    async def send(self, raw: bytes) -> None:
        """Send these bytes."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.socket, raw)

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end, and ``end`` tells which."""
        if self.end is None:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    block = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
            except ConnectionResetError:
                self.end = "reset"
            else:
                self.buffer += block
                self.end = None if block else "closed"
        return self.end is None

    def take(self, limit: int | None = None) -> bytes:
        """What has come, at most `limit` bytes of it."""
        taken = bytes(self.buffer[:limit])
        del self.buffer[: len(taken)]
        return taken

    async def line(self, *, skip_blank: bool = False) -> bytes | None:
        """The next line without its CRLF; None where the connection ends before it."""
        while (at := self.buffer.find(b"\r\n")) < 0:
            if not await self.fill():
                return None
        line = self.take(at + 2)[:-2]
        return await self.line() if skip_blank and not line else line

    async def response(self, method: str = "GET") -> Response:
        """The next answer, as soon as its head is here."""
        while (at := self.buffer.find(b"\r\n\r\n")) < 0:
            assert await self.fill(), f"{self.end} without an answer: {bytes(self.buffer)!r}"
        head = self.take(at + 4)
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        response = Response(self, int(first.split()[1]), head, headers)
        response.start_body(method)
        return response

    def close(self) -> None:
        """Leave."""
        self.socket.close()

    def reset(self) -> None:
        """Leave with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def request_bytes(
    method: str, target: str, headers: Headers = (), body: bytes | None = None, version: str = "1.1"
) -> bytes:
    """A request as it goes over the wire."""
    pairs = list(headers.items() if isinstance(headers, dict) else headers)
    lines: list[bytes] = [f"{method} {target} HTTP/{version}".encode(), b"Host: localhost"]
    for name, value in pairs:
        raw = value if isinstance(value, bytes) else value.encode()
        lines.append(name.encode() + b": " + raw)
    if body is not None:
        lines.append(f"Content-Length: {len(body)}".encode())
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


class Server:
    """A running application, and clients for it, which are closed with it."""

    def __init__(self, app: web.Application, runner: web.AppRunner) -> None:
        self.app = app
        self.runner = runner
        #: The sessions of a pyserve that is a part of the application.
        self.embedded: pyserve.StreamSessionManager
        self.connections: list[Connection] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.runner.addresses[0][:2]
        return f"http://{host}:{port}"

    @property
    def manager(self) -> pyserve.StreamSessionManager:
        """Its sessions."""
        return self.app[CONTEXT].manager

    def session(self, conversation_id: str) -> pyserve.StreamSession:
        """A session that is there."""
        session = self.manager.get(conversation_id)
        assert session is not None
        return session

    async def connect(self, receive_buffer_bytes: int | None = None) -> Connection:
        """A new connection."""
        client = socket.socket()
        client.setblocking(False)
        if receive_buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection = Connection(client)
        self.connections.append(connection)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_connect(client, self.runner.addresses[0][:2])
        return connection

    async def open(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | None = None,
        *,
        json: Any = None,
        version: str = "1.1",
    ) -> Response:
        """The answer to a request on a connection of its own, as soon as its head is here."""
        connection = await self.connect()
        body = orjson.dumps(json) if json is not None else body
        await connection.send(request_bytes(method, target, headers, body, version))
        return await connection.response(method)

    async def fetch(self, method: str, target: str, *args: Any, **keywords: Any) -> Response:
        """As :meth:`open`, read to its end."""
        return await (await self.open(method, target, *args, **keywords)).whole()

    async def exchange(self, raw: bytes) -> Response:
        """The whole answer to these bytes, on a connection of their own."""
        connection = await self.connect()
        await connection.send(raw)
        return await (await connection.response("POST")).whole()

    async def post(self, conversation_id: str, **headers: str) -> Response:
        """Start a chat completion under this conversation id."""
        pairs = {name.replace("_", "-"): value for name, value in headers.items()}
        pairs["X-Conversation-Id"] = conversation_id
        return await self.open("POST", "/v1/chat/completions", pairs, json={"stream": True})


#: The fixture that starts a server with settings of one's own.
Serve = Callable[..., Awaitable[Server]]


@asynccontextmanager
async def serving(
    app: web.Application | None = None,
    *,
    models: Sequence[pyserve.ModelConfig] | None = None,
    authenticate: Callable[[web.Request], str] | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """Serve `app`, or pyserve with these models and settings, on a free port.

    Upstreams are not asked for their health unless a setting says so: what comes to a fake one is
    what the test caused.
    """
    if app is None:
        settings.setdefault("health_interval_s", 0.0)
        told = {} if authenticate is None else {"authenticate": authenticate}
        app = pyserve.create_app(pyserve.Config(**settings), models=models, **told)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    server = Server(app, runner)
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield server
    finally:
        for connection in server.connections:
            connection.close()
        await runner.cleanup()


_MESSAGES = {
    "invalid_body": "The request body is not a valid JSON object",
    "invalid_offset": "A position is a number of bytes, an event id <epoch>-<offset>,"
    " or 'earliest'",
    "invalid_conversation_id": "A conversation id is 1 to 255 bytes of UTF-8 without control"
    " characters, not '.' or '..'",
}


def assert_refused(response: Response, reason: str) -> None:
    """It is the 400 of this reason, to the letter."""
    assert response.status == 400
    assert response.headers["content-type"] == "application/json"
    assert response.error == {
        "code": 400,
        "type": "invalid_request_error",
        "message": _MESSAGES[reason],
        "reason": reason,
    }


def log_of(session: pyserve.StreamSession) -> bytes:
    """All bytes of a log that nothing was dropped from."""
    reader = session.read_from()
    log = b""
    while block := reader.read_ready():
        log += block
    reader.close()
    return log


@dataclass(frozen=True)
class Event:
    """One event of a log."""

    data: str
    name: str
    epoch: str
    end: int


def events_of(log: bytes, start: int = 0) -> list[Event]:
    """The events of a log that was read from `start` on, each held against its id.

    The id must be the last line of its event and name the offset at which the event ends.
    """
    events = []
    fields: dict[str, list[str]] = {}
    offset = start
    for line in log.decode().split("\n")[:-1]:
        offset += len(line.encode()) + 1
        if line.startswith(":"):
            assert not fields, f"a comment within an event: {line!r}"
        elif line:
            assert "id" not in fields, f"the id is not the last field: {line!r}"
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        else:
            epoch, _, end = fields["id"][0].partition("-")
            assert int(end) == offset, f"the id {fields['id'][0]} ends at {offset}"
            data = "\n".join(fields["data"])
            events.append(Event(data, "".join(fields.get("event", [])), epoch, offset))
            fields = {}
    assert not fields, "the log ends within an event"
    return events


def texts_of(log: bytes, start: int = 0) -> list[str]:
    """The tokens of a chat completion's log, and ``[DONE]``, and an error's reason."""
    texts = []
    for event in events_of(log, start):
        if event.data == "[DONE]":
            texts.append(event.data)
            continue
        told = orjson.loads(event.data)
        texts.append(
            told["error"]["reason"] if "error" in told else told["choices"][0]["delta"]["content"]
        )
    return texts
