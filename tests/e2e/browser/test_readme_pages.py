"""The README's page of one's own and its EventSource, in Chromium, to the letter."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from chromium import needs_chromium
from cutting_proxy import CuttingProxy, cutting_proxy
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, FakeUpstream, chunk, token
from playwright.async_api import BrowserContext, expect
from serving import serving

import pyserve

if TYPE_CHECKING:
    import aiohttp

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

README = (Path(__file__).parents[3] / "README.md").read_text()


def block(language: str, holds: str) -> str:
    """The README's one block in this language that holds this."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (shown,) = [each for each in found if holds in each]
    return shown


def answer(
    first: bytes, going_on: asyncio.Event, *rest: bytes
) -> tuple[bytes | asyncio.Event, ...]:
    """An answer of which the rest is held back."""
    return (SSE_HEAD, chunk(first), going_on, *map(chunk, rest), LAST_CHUNK)


@asynccontextmanager
async def beside_pyserve(upstream: FakeUpstream, page: str) -> AsyncIterator[CuttingProxy]:
    """A host with pyserve on it and, at /mine.html, this page; and a wire to it."""

    async def show(_request: web.Request) -> web.Response:
        text = f'<!doctype html><link rel="icon" href="data:,">{page}'
        return web.Response(text=text, content_type="text/html")

    app = pyserve.create_app(pyserve.Config(upstream=upstream.url, health_interval_s=0))
    app.router.add_get("/mine.html", show)
    async with serving(app) as server, cutting_proxy(server.runner.addresses[0][:2]) as wire:
        yield wire


async def test_the_page_of_one_s_own_asks_stops_and_survives_a_reload(
    profile: BrowserContext,
) -> None:
    going_on, never = asyncio.Event(), asyncio.Event()
    async with FakeUpstream() as upstream:
        upstream.play(
            answer(token("one "), going_on, token("two"), DONE), answer(token("again"), never, DONE)
        )
        async with beside_pyserve(upstream, block("html", "pyserve.js")) as wire:
            page = await profile.new_page()
            async with page.expect_response("**/v1/stream?**") as attaching:
                await page.goto(f"{wire.url}/mine.html")
            assert (await attaching.value).status == 404  # there is nothing yet
            text = page.locator("#text")
            ask = page.get_by_role("button", name="Ask")
            await ask.click()
            await expect(text).to_have_text("one ")
            await page.reload()
            await expect(text).to_have_text("one ")
            await wire.break_all()
            going_on.set()
            await expect(text).to_have_text("one two")
            await page.reload()
            await expect(text).to_have_text("one two")

            await ask.click()
            await expect(text).to_have_text("again")
            await page.get_by_role("button", name="Stop").click()
            await (await upstream.exchange(1)).wait_closed()
            assert await text.text_content() == "again"


async def test_the_five_lines_of_event_source_go_on_after_a_loss_and_end(
    profile: BrowserContext, http: aiohttp.ClientSession
) -> None:
    going_on = asyncio.Event()
    async with FakeUpstream() as upstream:
        upstream.play(answer(token("one "), going_on, token("two"), DONE))
        page_text = f"<script>{block('js', 'EventSource')}</script>"
        async with beside_pyserve(upstream, page_text) as wire:
            url = f"{wire.url}/v1/chat/completions?conv_id=my-conversation"
            async with http.post(url, json={"stream": True, "messages": []}) as started:
                assert started.status == 200
            page = await profile.new_page()
            said: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            async with page.expect_console_message(lambda m: m.text.endswith("one ")):
                await page.goto(f"{wire.url}/mine.html")
            await wire.break_all()
            going_on.set()
            await page.wait_for_function("source.readyState === EventSource.CLOSED")
    told = [re.fullmatch("[0-9a-z]+-[0-9]+ (.*)", line) for line in said if "Failed" not in line]
    assert [match and match[1] for match in told] == ["one ", "two"]
