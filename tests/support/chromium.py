"""Debian's Chromium for the tests that need a real browser."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, BrowserContext, Playwright, async_playwright, expect

#: How long a page may take for anything.
PATIENCE_S = 15.0

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_chromium = pytest.mark.skipif(
    not shutil.which("chromium") and "CI" not in os.environ, reason="needs Chromium"
)


@asynccontextmanager
async def driver() -> AsyncIterator[Playwright]:
    """Playwright, with patience."""
    expect.set_options(timeout=PATIENCE_S * 1000)
    async with async_playwright() as playwright:
        yield playwright


@asynccontextmanager
async def launched(playwright: Playwright) -> AsyncIterator[Browser]:
    """A browser whose pages are all in front, as Playwright has it."""
    browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    await browser.close()


@asynccontextmanager
async def new_profile(browser: Browser) -> AsyncIterator[BrowserContext]:
    """A person's browser that knows nothing yet; its pages share what they keep."""
    context = await browser.new_context()
    context.set_default_timeout(PATIENCE_S * 1000)
    yield context
    await context.close()


@asynccontextmanager
async def browser_with_tabs(playwright: Playwright) -> AsyncIterator[Browser]:
    """A browser where only the tab in front is visible, as people have it.

    Playwright makes every page believe that it is in front; a browser that it did not start, it
    leaves as it is. Use the browser's own first context.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *(CHROMIUM, "--headless", *FLAGS, "--remote-debugging-port=0"),
            f"--user-data-dir={profile}",
            "about:blank",
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            url = await _listening(process)
            draining = asyncio.create_task(_drain(process))
            browser = await playwright.chromium.connect_over_cdp(url, no_defaults=True)
            yield browser
            await browser.close()
        finally:
            process.terminate()
            await process.wait()
        await draining


async def _listening(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(20):
        while not (found := re.search(rb"DevTools listening on (ws://\S+)", said)):
            line = await process.stderr.readline()
            assert line, said.decode(errors="replace")
            said += line
    return found[1].decode()


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while await process.stderr.read(65536):
        pass
