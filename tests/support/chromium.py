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
from playwright.async_api import Browser, Playwright

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


async def launch(playwright: Playwright) -> Browser:
    """A browser whose pages are all in front, as Playwright has it."""
    return await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


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
