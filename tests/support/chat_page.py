"""pyserve's page as a person sees it, and the generation behind it as a byte counter sees it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self
from urllib.parse import unquote

import aiohttp
from chromium import PATIENCE_S
from playwright.async_api import BrowserContext, Page, expect
from yarl import URL


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait for what nothing announces."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


# What is said for a moment only would slip through a poll.
RECORD = """
    globalThis.said = [];
    addEventListener("DOMContentLoaded", () => {
      const status = document.getElementById("status");
      new MutationObserver(() => said.push(status.textContent)).observe(status, {
        childList: true,
      });
    });
"""

# As if the tab that asked had been closed two minutes ago, before its question had an answer.
CLOSED_EARLY = """
    (id) => {
      const sentAt = Date.now() - 120_000;
      const messages = [
        { id: "q", role: "user", sentAt, text: "did it arrive?" },
        { id: "a", role: "assistant", attempt: 0, key: "k", sentAt, state: "sent", offset: 0,
          text: "", reasoning: "", gaps: [] },
      ];
      const chat = { id, title: "lost", created: sentAt, updated: sentAt, messages };
      const meta = { title: "lost", created: sentAt, live: true };
      localStorage.setItem(`pyserve:/:chat:${id}`, JSON.stringify(chat));
      localStorage.setItem(`pyserve:/:meta:${id}`, JSON.stringify(meta));
    }
"""


class Chat:
    """One tab with the page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.prompt = page.get_by_label("Message", exact=True)
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name="Stop")
        self.retry = page.get_by_role("button", name="Retry")
        self.status = page.get_by_test_id("status")
        self.status_line = page.locator("#status-line")
        self.answer = page.get_by_test_id("answer").last
        self.article = page.locator("article[data-role=assistant]").last
        self.gaps = page.locator("[data-gap]")

    @classmethod
    async def open(cls, context: BrowserContext, url: str, conversation_id: str = "") -> Self:
        """A new tab, at an address or at a conversation of it."""
        chat = cls(await context.new_page())
        await chat.page.add_init_script(RECORD)
        fragment = f"#{URL.build(fragment=conversation_id).raw_fragment}"
        await chat.page.goto(url + (fragment if conversation_id else ""))
        await expect(chat.page.get_by_test_id("model")).not_to_have_text("…")
        return chat

    @property
    def conversation_id(self) -> str:
        """The conversation that is shown, from the address."""
        return unquote(URL(self.page.url).raw_fragment)

    async def set_options(self, *, plain: bool, max_tokens: int | None) -> None:
        """The options, as the form has them."""
        await self.page.locator("#options summary").click()
        await self.page.locator("#plain").set_checked(plain)
        limit = self.page.locator("#max-tokens")
        await limit.fill("" if max_tokens is None else str(max_tokens))
        await limit.dispatch_event("change")
        await self.page.locator("#options summary").click()

    async def ask(self, text: str = "bado kele") -> None:
        """Type a question and send it."""
        await self.prompt.fill(text)
        await self.send.click()
        await expect(self.article).to_be_visible()

    async def is_in(self, *states: str) -> None:
        """Wait until the status line has one of these states."""
        wanted = re.compile(f"^({'|'.join(states)})$")
        await expect(self.status_line).to_have_attribute("data-state", wanted)

    async def said(self) -> list[str]:
        """All that the status line has said since the page was loaded, in turn."""
        said: list[str] = await self.page.evaluate("said")
        return said

    async def text(self) -> str:
        """What is shown of the last answer, to the character."""
        return await self.answer.text_content() or ""

    async def shows(self, text: str) -> None:
        """Wait until the last answer is this, to the character."""
        shown = ""

        async def same() -> bool:
            nonlocal shown
            shown = await self.text()
            return shown == text

        with suppress(AssertionError):  # the one below says more
            await until(same, "the text")
        assert shown == text


class Log:
    """A stream, read to its end by a client that is never interrupted."""

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        self.pieces: list[tuple[int, str]] = []  # the offset that an event ends at, what it adds
        self.end = ""
        self._news = asyncio.Condition()
        self._reading: asyncio.Task[None]

    @classmethod
    async def follow(cls, http: aiohttp.ClientSession, server_url: str, chat: Chat) -> Self:
        """Read what this page has asked for, from its beginning."""
        await expect(chat.page).to_have_url(re.compile("#"))
        log = cls(chat.conversation_id)
        url = URL(f"{server_url}/v1/stream").with_query(conv_id=log.conversation_id, **{"from": 0})
        there = asyncio.Event()
        log._reading = asyncio.create_task(log._read(http, url, there))
        await there.wait()
        return log

    async def _read(self, http: aiohttp.ClientSession, url: URL, there: asyncio.Event) -> None:
        try:
            for _ in range(200):  # the page's POST is on its way
                async with http.get(url) as answer:
                    if answer.status == 200:
                        there.set()
                        await self._take(answer)
                        return
                await asyncio.sleep(0.02)
            raise AssertionError("the page asked for nothing")
        finally:
            there.set()

    async def _take(self, answer: aiohttp.ClientResponse) -> None:
        data = ""
        async for raw in answer.content:
            line = raw.decode().rstrip("\n")
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
            elif line.startswith("id: "):
                await self._add(int(line.rpartition("-")[2]), _content(data))
            elif line.startswith(": end"):
                self.end = line.removeprefix(": end ")

    async def _add(self, offset: int, text: str) -> None:
        async with self._news:
            self.pieces.append((offset, text))
            self._news.notify_all()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(text for _, text in self.pieces)

    def text_without(self, lost_from: int, lost_bytes: int) -> str:
        """The text for somebody to whom these bytes were lost."""
        lost = range(lost_from + 1, lost_from + lost_bytes + 1)
        return "".join(text for end, text in self.pieces if end not in lost)

    async def has(self, events: int) -> str:
        """The text, as soon as it has so many events."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: len(self.pieces) >= events)
        return self.text

    async def whole(self) -> str:
        """The text, as soon as the stream is over."""
        async with asyncio.timeout(PATIENCE_S):
            await self._reading
        assert self.end
        return self.text

    async def close(self) -> None:
        """Read no more."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


def _content(data: str) -> str:
    if data == "[DONE]":
        return ""
    chunk = json.loads(data)
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
