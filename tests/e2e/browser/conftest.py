"""Real Chromium before pyserve before real llama.cpp, with a gate and a wire between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from chat_page import Chat, Log
from chromium import driver, launched, new_profile
from cutting_proxy import CuttingProxy, cutting_proxy
from gate import Gate, gate
from playwright.async_api import Browser, BrowserContext, Playwright
from process import Server
from serving import serving
from yarl import URL


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def playwright() -> AsyncIterator[Playwright]:
    async with driver() as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(playwright: Playwright) -> AsyncIterator[Browser]:
    async with launched(playwright) as browser:
        yield browser


def watch(context: BrowserContext) -> list[str]:
    """What pages complain of, as it comes. Chromium itself tells of every 4xx, 5xx and refused
    connection; those are no complaint of the page's."""
    complaints: list[str] = []

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            complaints.append(f"{message.type}: {message.text}")

    context.on("console", on_console)
    context.on("weberror", lambda error: complaints.append(f"uncaught: {error.error}"))
    return complaints


@pytest_asyncio.fixture(loop_scope="session")
async def profile(browser: Browser) -> AsyncIterator[BrowserContext]:
    """A browser that knows nothing yet. No page in it may complain of anything."""
    async with new_profile(browser) as context:
        complaints = watch(context)
        yield context
    assert complaints == []


@pytest_asyncio.fixture(loop_scope="session")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        yield session


#: Opens a tab at an address.
OpenChat = Callable[..., Awaitable[Chat]]


@dataclass
class Scene:
    """A pyserve in front of a gate in front of llama.cpp, and a wire from pyserve to browsers."""

    gate: Gate
    wire: CuttingProxy
    server_url: str
    http: aiohttp.ClientSession
    stack: AsyncExitStack

    async def begin(self, open_chat: OpenChat, events: int, **options: Any) -> tuple[Chat, Log]:
        """A page whose answer is held after so many events, all of which it shows."""
        self.gate.hold(after_events=events)
        chat: Chat = await open_chat(self.wire.url, **options)
        await chat.ask()
        log = await self.follow(chat)
        await self.let(events, log, chat)
        return chat, log

    async def follow(self, chat: Chat) -> Log:
        """The log of what this page asked for, from its first byte on."""
        log = await Log.follow(self.http, self.server_url, chat)
        self.stack.push_async_callback(log.close)
        return log

    async def let(self, events: float, log: Log, *chats: Chat) -> None:
        """Let so many events pass, and wait until the pages show all of them."""
        await self.gate.open(after_events=events)
        text = await log.has(int(events))
        for chat in chats:
            await chat.shows(text)


#: Sets a scene with settings of one's own.
SetScene = Callable[..., Awaitable[Scene]]


@pytest_asyncio.fixture(loop_scope="session")
async def set_scene(llama: Server, http: aiohttp.ClientSession) -> AsyncIterator[SetScene]:
    async with AsyncExitStack() as stack:

        async def set_it(**settings: Any) -> Scene:
            the_gate = await stack.enter_async_context(gate(llama.url))
            server = await stack.enter_async_context(serving(upstream=the_gate.url, **settings))
            address = server.runner.addresses[0][:2]
            wire = await stack.enter_async_context(cutting_proxy(address))
            url = str(URL.build(scheme="http", host=address[0], port=address[1]))
            return Scene(the_gate, wire, url, http, stack)

        yield set_it


@pytest_asyncio.fixture(loop_scope="session")
async def scene(set_scene: SetScene) -> Scene:
    return await set_scene()


@pytest.fixture
def open_chat(profile: BrowserContext) -> OpenChat:
    """A tab, with the options set as asked."""

    async def open_page(
        url: str, conversation_id: str = "", *, tokens: int | None = 100, plain: bool = True
    ) -> Chat:
        chat = await Chat.open(profile, url, conversation_id)
        if not conversation_id:
            await chat.set_options(plain=plain, max_tokens=tokens)
        return chat

    return open_page
