"""What one writes by hand with aiohttp: a list of events and an asyncio.Event for each stream, a
coroutine for each reader, a write for each event.

    python plain_aiohttp.py [UPSTREAM_URL] [--uvloop]
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
from aiohttp import web
from events import DONE, with_id
from server_loop import Append, run, serve

_EPOCH = b"m3x9k2ab"


class Stream:
    """The events so far, and a signal for the next."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.news = asyncio.Event()
        self.is_over = False
        self._offset = 0

    def append(self, event: bytes) -> None:
        event = with_id(event, _EPOCH, self._offset)
        self._offset += len(event)
        self.events.append(event)
        self._signal()

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._signal()

    def _signal(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class PlainStreams:
    """All streams, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Stream] = {}

    def create(self, count: int) -> list[Append]:
        self.by_name = {f"s{number}": Stream() for number in range(count)}
        return [stream.append for stream in self.by_name.values()]

    def position(self) -> int:
        return len(self.by_name["s0"].events)

    def end(self) -> None:
        for stream in self.by_name.values():
            stream.append(DONE)
            stream.end()

    def drop(self) -> None:
        for stream in self.by_name.values():
            stream.end()
        self.by_name = {}


async def write_stream(request: web.Request, stream: Stream) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    position = int(request.query.get("from", 0))
    with suppress(ConnectionResetError):  # the reader has left
        while not stream.is_over or position < len(stream.events):
            while position < len(stream.events):
                await response.write(stream.events[position])
                position += 1
            if not stream.is_over:
                await stream.news.wait()
    return response


def make_app(streams: PlainStreams, upstream_url: str | None) -> web.Application:
    tasks = set()

    async def read(request: web.Request) -> web.StreamResponse:
        return await write_stream(request, streams.by_name[request.match_info["name"]])

    async def ingest(stream: Stream, body: bytes) -> None:
        """The upstream's events, each published when it is whole."""
        async with app[_HTTP].post(f"{upstream_url}/v1/chat/completions", data=body) as answer:
            event = b""
            async for line in answer.content:
                event += line
                if line == b"\n":
                    stream.append(event)
                    event = b""
        stream.end()

    async def generate(request: web.Request) -> web.StreamResponse:
        stream = streams.by_name[request.headers["X-Conversation-Id"]] = Stream()
        task = asyncio.create_task(ingest(stream, await request.read()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return await write_stream(request, stream)

    app = web.Application()
    app.cleanup_ctx.append(_http_client)
    app.router.add_get("/v1/stream/{name}", read)
    app.router.add_post("/v1/chat/completions", generate)
    return app


_HTTP = web.AppKey("http", aiohttp.ClientSession)


async def _http_client(app: web.Application) -> AsyncIterator[None]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as app[_HTTP]:
        yield


async def main(upstream_url: str | None = None) -> None:
    streams = PlainStreams()
    await serve(make_app(streams, upstream_url), streams)


if __name__ == "__main__":
    run(main)
