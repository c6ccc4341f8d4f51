"""Many live sessions, each with a producer in the process and a reader in another one.

``python many_sessions.py serve SESSIONS EVENTS RATE`` is a service with pyserve inside. ``POST
/run`` appends EVENTS to each session, RATE a second, spread evenly, and answers what it measured.

``python many_sessions.py read URL SESSIONS`` reads each session over a connection of its own. It
prints "attached" when it has all heads, and at the end what it got.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

import pyserve

#: Producers take turns so often within the time of one event.
TURNS = 20

#: Some four seconds at 50 events a second: who is later than that loses bytes.
MAX_SESSION_BYTES = 64 * 1024

#: Memory is looked at so often.
SAMPLES = 6

PADDING = b"x" * 250

# More at once overflow the queue of connections that aren't accepted yet.
CONNECTS_AT_ONCE = 50


def event_of(session: int, number: int) -> bytes:
    """One event, without its blank line."""
    return b"data: %d %d %s\n" % (session, number, PADDING)


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Producers:
    """Append to all sessions at fixed times, as upstreams do that know nothing of this process.

    Who comes late finds several events due, and appends them together, as one read of a socket.
    """

    def __init__(self, sessions: list[pyserve.StreamSession], events: int, rate: float) -> None:
        self._sessions = sessions
        self._events = events
        self._interval_s = 1 / rate
        self.latest_s = 0.0
        self.rss_bytes: list[int] = []
        #: When the events of the first session were due, on the clock of all processes.
        self.times_s: list[float] = []

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        start = clock()
        appended = [0] * TURNS
        while min(appended) < self._events:
            for turn, done in enumerate(appended):
                due_s = start + (done + turn / TURNS) * self._interval_s
                await asyncio.sleep(max(0, due_s - clock()))
                late_s = clock() - due_s
                self.latest_s = max(self.latest_s, late_s)
                until = min(done + 1 + int(late_s / self._interval_s), self._events)
                self._append(turn, range(done, until))
                appended[turn] = until
            if appended[0] * SAMPLES >= len(self.rss_bytes) * self._events:
                self.rss_bytes.append(rss_bytes())
        self.times_s = [start + number * self._interval_s for number in range(self._events)]
        for session in self._sessions:
            session.finalize()

    def _append(self, turn: int, numbers: range) -> None:
        for index in range(turn, len(self._sessions), TURNS):
            block = b"".join(event_of(index, number) + b"\n" for number in numbers)
            self._sessions[index].append(block)


async def serve(count: int, events: int, rate: float) -> None:
    app = web.Application()
    config = pyserve.Config(max_session_bytes=MAX_SESSION_BYTES, heartbeat_interval_s=3600)
    manager = pyserve.setup(app, config, prefix="/llm")

    async def run(_request: web.Request) -> web.Response:
        clock = asyncio.get_running_loop().time
        start, cpu_start = clock(), time.process_time()
        producers = Producers(sessions, events, rate)
        await producers.run()
        measured = {
            "elapsed_s": clock() - start,
            "cpu_s": time.process_time() - cpu_start,
            "latest_s": producers.latest_s,
            "rss_bytes": [rss_before, *producers.rss_bytes],
            "times_s": producers.times_s,
            "epochs": [session.epoch for session in sessions],
        }
        return web.json_response(measured)

    app.router.add_post("/run", run)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    rss_before = rss_bytes()
    sessions = [manager.create_or_replace(f"session-{index}") for index in range(count)]
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


class Reader(asyncio.Protocol):
    """Counts and sums up a body. HTTP/1.0, so that it comes bare."""

    def __init__(self, index: int, heads: asyncio.Semaphore) -> None:
        self._request = f"GET /llm/v1/stream/session-{index} HTTP/1.0\r\nHost: localhost\r\n\r\n"
        self._heads = heads
        self._in_head = True
        self.length = 0
        self.checksum = 0
        #: When something came, and how much there was then; of the first session only.
        self.arrivals: list[tuple[float, int]] | None = [] if index == 0 else None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = asyncio.get_running_loop().time

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request.encode())

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            head, _, data = data.partition(b"\r\n\r\n")
            assert b" 200 " in head, head
            self._in_head = False
            self._heads.release()
        self.length += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
        if self.arrivals is not None:
            self.arrivals.append((self._clock(), self.length))

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set_result(None)


async def read(url: str, count: int) -> None:
    loop = asyncio.get_running_loop()
    host, port = urlsplit(url).hostname, urlsplit(url).port
    heads = asyncio.Semaphore(0)
    readers = [Reader(index, heads) for index in range(count)]
    for start in range(0, count, CONNECTS_AT_ONCE):
        some = readers[start : start + CONNECTS_AT_ONCE]
        for reader in some:
            await loop.create_connection(lambda r=reader: r, host, port)
        for _ in some:
            await heads.acquire()
    print("attached", flush=True)
    await asyncio.gather(*(reader.over for reader in readers))
    sums = [(reader.length, reader.checksum) for reader in readers]
    print(json.dumps({"sums": sums, "arrivals": readers[0].arrivals}), flush=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    else:
        asyncio.run(read(sys.argv[2], int(sys.argv[3])))
