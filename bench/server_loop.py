"""What the bench's Python servers share: their commands, their producer, their loop's lag.

A server prints ``{"port": N}`` and takes commands from standard input, as bare_server.cpp does:
``prepare STREAMS EVENTS RATE``, ``fill``, ``end``, ``go``, ``finish``. Each is answered by a line
of JSON; ``finish`` tells how late the event loop was since ``go``.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Protocol

from aiohttp import web
from events import make_event

EVENTS_BEHIND = 10
BURST_EVENTS = 256
SHORTEST_TICK_S = 0.002
PROBE_INTERVAL_S = 0.005
UVLOOP = "--uvloop"
MOST_DESCRIPTORS = 65_536

Append = Callable[[bytes], None]


class Streams(Protocol):
    """Streams in the server's memory, appended to by the producer here."""

    def create(self, count: int) -> list[Append]:
        """Make streams 0 to `count` - 1, and what appends to each."""

    def position(self) -> int:
        """Where the first stream ends, as its readers say it in ``from=``."""

    def end(self) -> None:
        """End every stream."""

    def drop(self) -> None:
        """Forget every stream."""


class Producer:
    """One task that appends to all streams: cheap, and the same for every server."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._appends: list[Append] = []
        self._events = 0
        self._rate = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._late_s: list[float] = []

    async def obey(self, verb: str, *arguments: str) -> dict[str, object]:
        """Carry out one command; returns the answer to it."""
        if verb == "prepare":
            streams, events, rate = arguments
            self._events, self._rate = int(events), float(rate)
            self._appends = self._streams.create(int(streams))
        elif verb == "fill":
            return {"position": await self._fill()}
        elif verb == "end":
            self._streams.end()
        elif verb == "go":
            self._go()
        elif verb == "finish":
            return await self._finish()
        return {}

    def _go(self) -> None:
        work = []
        if self._appends:  # otherwise an upstream produces
            work.append(self._produce_at_rate if self._rate else self._produce_burst)
        if not (self._appends and self._rate):  # otherwise the producer's own timer tells the lag
            work.append(self._probe)
        self._tasks = [asyncio.create_task(each()) for each in work]

    async def _fill(self) -> int:
        position = 0
        for seq in range(self._events):
            if seq == self._events - EVENTS_BEHIND:
                position = self._streams.position()
            for append in self._appends:
                append(make_event(seq))
        return position

    async def _finish(self) -> dict[str, object]:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._streams.drop()
        late_ms = sorted(1000 * late_s for late_s in self._late_s)
        self._tasks, self._appends, self._late_s = [], [], []
        if not late_ms:
            return {"lag_ms": None}
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        last = len(late_ms) - 1
        return {"lag_ms": {name: late_ms[int(share * last)] for name, share in shares.items()}}

    async def _sleep_until(self, due_s: float) -> None:
        clock = asyncio.get_running_loop().time
        if due_s > clock():
            await asyncio.sleep(due_s - clock())
            self._late_s.append(clock() - due_s)

    async def _produce_at_rate(self) -> None:
        """The streams take turns within an interval. Who comes late appends all that is due."""
        turns = max(1, min(len(self._appends), int(1 / self._rate / SHORTEST_TICK_S)))
        start_s = asyncio.get_running_loop().time()
        for tick in range(self._events * turns):
            await self._sleep_until(start_s + tick / turns / self._rate)
            event = make_event(tick // turns)
            for append in self._appends[tick % turns :: turns]:
                append(event)
        self._streams.end()

    async def _produce_burst(self) -> None:
        for first in range(0, self._events, BURST_EVENTS):
            for seq in range(first, min(first + BURST_EVENTS, self._events)):
                event = make_event(seq)
                for append in self._appends:
                    append(event)
            await asyncio.sleep(0)
        self._streams.end()

    async def _probe(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self._sleep_until(clock() + PROBE_INTERVAL_S)


def raise_descriptor_limit() -> None:
    """As many as the system gives: a reader may take two."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in (max(hard, MOST_DESCRIPTORS), hard):  # only root may raise the hard limit
        with suppress(ValueError, PermissionError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return


async def serve(app: web.Application, streams: Streams) -> None:
    """Serve `app` and carry out commands until standard input ends."""
    raise_descriptor_limit()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    producer = Producer(streams)
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    while line := await commands.readline():
        print(json.dumps(await producer.obey(*line.decode().split())), flush=True)
    await runner.cleanup()


def run(main: Callable[..., Coroutine[None, None, None]]) -> None:
    """Run `main` with the words of the command line, on uvloop with ``--uvloop``."""
    words = [word for word in sys.argv[1:] if word != UVLOOP]
    if UVLOOP in sys.argv:
        import uvloop

        uvloop.run(main(*words))
    else:
        asyncio.run(main(*words))
