"""Eight tabs over a browser's six connections: a real browser's, where one tab is in front."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from chat_page import PATIENCE_S, Chat
from chromium import browser_with_tabs, needs_chromium
from llama import LONG, wait_busy_slots
from playwright.async_api import Playwright
from process import Server

if TYPE_CHECKING:
    from conftest import Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

TABS = 8


async def test_each_of_eight_tabs_streams_when_it_is_looked_at_and_can_be_stopped(
    scene: Scene, playwright: Playwright, llama: Server
) -> None:
    await wait_busy_slots(scene.http, llama.url, 0)
    async with browser_with_tabs(playwright) as browser:
        (profile,) = browser.contexts
        profile.set_default_timeout(PATIENCE_S * 1000)
        scene.gate.hold(after_events=10)
        chats, logs = [], []
        for number in range(TABS):
            chat = await Chat.open(profile, scene.wire.url)
            await chat.set_options(plain=True, max_tokens=100 if number else LONG)
            await chat.ask(f"question {number}")
            logs.append(await scene.follow(chat))
            await chat.shows(await logs[-1].has(10))
            chats.append(chat)
        shown = [await chat.page.evaluate("document.visibilityState") for chat in chats]
        assert shown == ["hidden"] * (TABS - 1) + ["visible"]

        await scene.gate.open(after_events=20)
        for chat, log in zip(chats, logs, strict=True):
            await chat.page.bring_to_front()
            await chat.shows(await log.has(20))

        await chats[0].page.bring_to_front()
        await chats[0].stop.click()
        await chats[0].is_in("cancelled")
        await logs[0].whole()
        assert logs[0].end == "cancelled"
        await scene.gate.open()
        texts = await asyncio.gather(*(log.whole() for log in logs))
        for chat, text in zip(chats, texts, strict=True):
            await chat.page.bring_to_front()
            await chat.is_in("completed" if chat is not chats[0] else "cancelled")
            assert await chat.text() == text
        assert scene.gate.generations == TABS
