"""What a page's main thread did, by Chromium's own account."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
from playwright.async_api import Browser, Page


@dataclass
class MainThread:
    """CPU times of its tasks, in milliseconds: a busy machine makes tasks wait, not work."""

    tasks_ms: list[float] = field(default_factory=list)
    #: From the first task to the last one, on the clock.
    seconds: float = 0.0

    @property
    def longest_ms(self) -> float:
        return max(self.tasks_ms)


@asynccontextmanager
async def traced(browser: Browser, page: Page) -> AsyncIterator[MainThread]:
    """Trace the page's main thread; the figures are there afterwards."""
    main_thread = MainThread()
    await browser.start_tracing(
        page=page, categories=["disabled-by-default-devtools.timeline", "__metadata"]
    )
    try:
        yield main_thread
    finally:
        trace = await browser.stop_tracing()
    events = orjson.loads(trace)["traceEvents"]
    threads = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = [
        event
        for event in events
        if event["name"] == "RunTask" and (event["pid"], event["tid"]) in threads
    ]
    main_thread.tasks_ms = [task["tdur"] / 1000 for task in tasks]
    starts = [task["ts"] for task in tasks]
    main_thread.seconds = (max(starts) - min(starts)) / 1e6
