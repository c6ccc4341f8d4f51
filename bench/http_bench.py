"""One stream through HTTP: an upstream alone, behind a plain aiohttp proxy, and behind pyserve.

The three are measured in turn, round after round in one run, so that the ratios hold on a machine
whose speed drifts. Each stream's bytes are counted and its last event is checked.

    python bench/http_bench.py [--rounds N] [--events N]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import aiohttp
import click
from aiohttp import web

import pyserve

EVENT_BYTES = 240
_EVENT = b"data: " + b"x" * (EVENT_BYTES - 8) + b"\n\n"
_DONE = b"data: [DONE]\n\n"
_BODY = {"stream": True, "messages": []}
_PATH = "/v1/chat/completions"
_EVENTS = web.AppKey("events", int)


async def _serve_upstream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(request.app[_EVENTS]):
        await response.write(_EVENT)
    await response.write(_DONE)
    return response


def upstream_app(events: int, _upstream_url: str) -> web.Application:
    """Sends `events` events for each request, as fast as they are taken."""
    app = web.Application()
    app[_EVENTS] = events
    app.router.add_post(_PATH, _serve_upstream)
    return app


def plain_proxy_app(_events: int, upstream_url: str) -> web.Application:
    """What one writes by hand: a loop that copies blocks. It loses the text with its reader."""

    async def proxy(request: web.Request) -> web.StreamResponse:
        async with (
            aiohttp.ClientSession() as http,
            http.post(upstream_url + _PATH, data=await request.read()) as answer,
        ):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for block in answer.content.iter_any():
                await response.write(block)
            return response

    app = web.Application()
    app.router.add_post(_PATH, proxy)
    return app


def pyserve_app(_events: int, upstream_url: str) -> web.Application:
    """pyserve in front of the same upstream."""
    return pyserve.create_app(pyserve.Config(upstream=upstream_url))


AppFactory = Callable[[int, str], web.Application]


def _run_server(make_app: AppFactory, events: int, upstream_url: str, ready: Connection) -> None:
    async def run() -> None:
        runner = web.AppRunner(make_app(events, upstream_url), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(run())


@dataclass
class Server:
    """A server in a process of its own, and what was measured of it."""

    name: str
    url: str
    process: multiprocessing.Process
    seconds: list[float] = field(default_factory=list)
    first_byte_seconds: list[float] = field(default_factory=list)


def start(name: str, make_app: AppFactory, events: int, upstream_url: str = "") -> Server:
    """Start a server and wait until it listens."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run_server, args=(make_app, events, upstream_url, theirs), daemon=True
    )
    process.start()
    return Server(name, ours.recv(), process)


async def read_stream(http: aiohttp.ClientSession, server: Server, events: int) -> None:
    """Read one stream to its end and note how long it took."""
    began = time.perf_counter()
    headers = {"X-Conversation-Id": "bench"}
    received = 0
    tail = b""
    async with http.post(server.url + _PATH, json=_BODY, headers=headers) as answer:
        async for block in answer.content.iter_any():
            if not received:
                server.first_byte_seconds.append(time.perf_counter() - began)
            received += len(block)
            tail = (tail + block)[-64:]
    server.seconds.append(time.perf_counter() - began)
    assert received >= events * EVENT_BYTES, f"{server.name} lost bytes"
    assert b"[DONE]" in tail, f"{server.name} lost the end"


async def measure(servers: list[Server], rounds: int, events: int) -> None:
    """Read from each server in turn, `rounds` times after one that doesn't count."""

    async def one_round(http: aiohttp.ClientSession) -> None:
        for server in servers:
            await read_stream(http, server, events)

    async with aiohttp.ClientSession() as http:
        await one_round(http)
        for server in servers:
            server.seconds.clear()
            server.first_byte_seconds.clear()
        with click.progressbar(range(rounds), label="one stream through HTTP") as bar:
            for _ in bar:
                await one_round(http)


def print_table(servers: list[Server], events: int) -> None:
    """Medians, and each server's ratio to the first in the same round."""
    base = servers[0]
    title = f"{events:,} events of {EVENT_BYTES} bytes"
    print(f"\n| {title} | events/s | time, ratio | first byte ms |")
    print("| --- | ---: | ---: | ---: |")
    for server in servers:
        ratio = statistics.median(a / b for a, b in zip(server.seconds, base.seconds, strict=True))
        rate = events / statistics.median(server.seconds)
        first_ms = 1000 * statistics.median(server.first_byte_seconds)
        print(f"| {server.name} | {rate:,.0f} | {ratio:.2f} | {first_ms:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--events", type=int, default=20_000, help="default: %(default)s")
    options = parser.parse_args()
    upstream = start("the upstream alone", upstream_app, options.events)
    servers = [
        upstream,
        start("plain aiohttp proxy", plain_proxy_app, options.events, upstream.url),
        start("pyserve", pyserve_app, options.events, upstream.url),
    ]
    try:
        asyncio.run(measure(servers, options.rounds, options.events))
        print_table(servers, options.events)
    finally:
        for server in servers:
            server.process.terminate()


if __name__ == "__main__":
    main()
