"""A thousand live sessions with a reader each: nothing is lost, and memory stays flat."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import aiohttp
import many_sessions
import pytest
from expected_log import expected_log
from many_sessions import event_of
from process import Process, Server, environment

SOAK = bool(os.environ.get("PYSERVE_SOAK"))
SESSIONS, SECONDS = (1000, 30) if SOAK else (100, 3)
RATE = 50
EVENTS = SECONDS * RATE

COMMAND = [sys.executable, Path(many_sessions.__file__)]


def expected_sum(index: int, epoch: str) -> list[int]:
    log = expected_log((event_of(index, number) for number in range(EVENTS)), epoch)
    return [len(log), zlib.crc32(log)]


def delays_ms(times_s: list[float], arrivals: list[tuple[float, int]], epoch: str) -> list[float]:
    """How long after its time each event of the first session was read."""
    log = expected_log((event_of(0, number) for number in range(EVENTS)), epoch)
    ends = [blank_line.end() for blank_line in re.finditer(rb"\n\n", log)]
    delays = []
    arriving = iter(arrivals)
    arrived_s, length = next(arriving)
    for time_s, end in zip(times_s, ends, strict=True):
        while length < end:
            arrived_s, length = next(arriving)
        delays.append((arrived_s - time_s) * 1000)
    return delays


@pytest.mark.timeout(180)
async def test_no_reader_of_many_loses_a_byte_and_memory_is_flat(
    http: aiohttp.ClientSession, tell: Callable[[str], None]
) -> None:
    serve = [*COMMAND, "serve", str(SESSIONS), str(EVENTS), str(RATE)]
    with Server(serve, environment()) as server:
        read = [*COMMAND, "read", server.url, str(SESSIONS)]
        with Process(read, environment()) as readers:
            readers.wait_for("attached")
            async with http.post(f"{server.url}/run") as answer:
                measured = await answer.json()
            assert readers.wait() == 0
            got = json.loads(readers.output.removeprefix("attached\n"))

    epochs = measured["epochs"]
    assert got["sums"] == [expected_sum(index, epoch) for index, epoch in enumerate(epochs)]

    before, *rss = measured["rss_bytes"]
    delays = delays_ms(measured["times_s"], got["arrivals"], epochs[0])
    tell(
        f"{SESSIONS} sessions, {SESSIONS * EVENTS:,} events, {sum(n for n, _ in got['sums']):,}"
        f" bytes: {EVENTS / measured['elapsed_s']:.1f} events a second each,"
        f" producers at most {measured['latest_s'] * 1000:.0f} ms late,"
        f" {measured['cpu_s'] / SESSIONS / EVENTS * 1e6:.1f} us of CPU for an event"
    )
    tell(
        f"from producer to reader: median {statistics.median(delays):.1f} ms,"
        f" p99 {statistics.quantiles(delays, n=100)[98]:.1f} ms, max {max(delays):.1f} ms"
    )
    each = ", ".join(f"{(bytes_ - before) / SESSIONS / 1024:.0f}" for bytes_ in rss)
    tell(f"RSS for each session, in sixths of the time: {each} KiB ({rss[-1] / 2**20:.0f} MiB)")
    # Full logs span two chunks of 64 KiB: all are touched after 9 of 30 seconds.
    if SOAK:
        assert rss[-1] < 1.05 * rss[2]
