"""What the page keeps in the browser: two tabs that ask at once, a storage that takes nothing, a
question whose tab was closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from chat_page import CLOSED_EARLY, Chat, until
from chromium import needs_chromium
from playwright.async_api import BrowserContext, Page, expect

if TYPE_CHECKING:
    from conftest import OpenChat, Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

TOKENS = 60

FULL = """
    Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };
"""
DENIED = """
    Object.defineProperty(globalThis, "localStorage", {
      get: () => { throw new DOMException("denied", "SecurityError"); },
    });
"""

# Neither tab can hear of the other before it has sent.
SEND_AT = """
    (at) => {
      while (Date.now() < at);
      document.getElementById("composer").requestSubmit();
    }
"""

# As a tab does that has not yet heard of the last question.
OVERWRITE = """
    () => {
      const [key, text] = Object.entries(localStorage).find(([key]) => key.includes(":chat:"));
      const chat = JSON.parse(text);
      chat.messages.splice(-2);
      localStorage.setItem(key, JSON.stringify(chat));
    }
"""


async def shown(chat: Chat) -> list[str]:
    """Every message, from top to bottom, without the model's name."""
    texts = await chat.page.locator("article > .text").all_text_contents()
    return [text.strip() for text in texts]


async def test_two_tabs_that_ask_at_the_same_moment_come_to_show_the_same(
    scene: Scene, open_chat: OpenChat
) -> None:
    one = await open_chat(scene.wire.url, tokens=TOKENS)
    await one.ask("before")
    await one.is_in("completed")
    other = await open_chat(scene.wire.url, one.conversation_id)
    scene.gate.hold(after_events=10)
    asked = scene.gate.generations
    for number, chat in enumerate((one, other)):
        await chat.prompt.fill(f"at once {number}")
    at = await one.page.evaluate("Date.now()") + 300
    await asyncio.gather(*(chat.page.evaluate(SEND_AT, at) for chat in (one, other)))

    for chat in (one, other):
        await expect(chat.page.get_by_test_id("question")).to_have_count(3)
        await chat.is_in("streaming", "reattached")
    await scene.gate.open()
    for chat in (one, other):
        await expect(chat.page.locator("article[aria-busy=true]")).to_have_count(0)
    log = await scene.follow(one)
    text = await log.whole()

    async def same() -> bool:
        return await shown(one) == await shown(other)

    await until(same, "the same in both tabs")
    messages = await shown(one)
    assert text.strip() in messages
    assert {"at once 0", "at once 1"} <= set(messages)
    assert scene.gate.generations == asked + 1  # the other question was refused, and says so
    await one.page.reload()
    await expect(one.page.get_by_test_id("question")).to_have_count(3)
    assert await shown(one) == messages


async def test_a_question_that_another_tab_has_overwritten_is_written_again(
    scene: Scene, open_chat: OpenChat
) -> None:
    one = await open_chat(scene.wire.url, tokens=TOKENS)
    await one.ask("before")
    await one.is_in("completed")
    other = await open_chat(scene.wire.url, one.conversation_id)
    scene.gate.hold(after_events=10)
    await one.ask("overwritten")
    await one.is_in("streaming")
    await expect(other.page.get_by_test_id("question")).to_have_count(2)
    await other.page.evaluate(OVERWRITE)

    async def is_back() -> bool:
        return "overwritten" in await other.page.evaluate("JSON.stringify(localStorage)")

    await until(is_back, "the question in the storage")


async def trouble(page: Page) -> str:
    """The banner about the browser's storage."""
    banner = page.get_by_test_id("trouble")
    await expect(banner).to_be_visible()
    return await banner.text_content() or ""


@pytest.mark.parametrize(
    ("script", "why"), [(FULL, "full"), (DENIED, "denies")], ids=["full", "denied"]
)
async def test_a_browser_that_keeps_nothing_is_told_and_loses_no_question(
    scene: Scene, profile: BrowserContext, script: str, why: str
) -> None:
    await profile.add_init_script(script)
    chat = await Chat.open(profile, scene.wire.url)
    await chat.set_options(plain=True, max_tokens=TOKENS)
    await chat.ask("first")
    await chat.is_in("completed")
    text = await (await scene.follow(chat)).whole()
    assert await chat.text() == text
    for _ in range(2):
        said = await trouble(chat.page)
        assert said.startswith("This browser keeps nothing: ")
        assert why in said
        first = chat.page.locator("#conversations a", has_text="first")
        await chat.page.get_by_role("button", name="New conversation").click()
        await expect(chat.answer).to_have_count(0)
        await first.click()
        assert await chat.text() == text


async def test_a_storage_with_room_again_takes_all_and_the_banner_goes(
    scene: Scene, profile: BrowserContext, open_chat: OpenChat
) -> None:
    await profile.add_init_script("globalThis.take = Storage.prototype.setItem;" + FULL)
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.ask("kept after all")
    await chat.is_in("completed")
    assert "full" in await trouble(chat.page)
    await chat.page.evaluate("() => { Storage.prototype.setItem = take; }")
    await chat.set_options(plain=True, max_tokens=TOKENS)
    await expect(chat.page.get_by_test_id("trouble")).to_be_hidden()
    text = await chat.text()
    await chat.page.reload()
    await expect(chat.page.get_by_test_id("question")).to_have_text("kept after all")
    assert await chat.text() == text


async def test_a_question_whose_tab_was_closed_is_unsure_and_can_be_asked_again(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.page.evaluate(CLOSED_EARLY, "lost-one")
    await chat.page.reload()
    item = chat.page.locator('li[data-conversation-id="lost-one"]')
    await expect(item.locator(".spinner")).to_be_hidden()  # though nobody has opened it
    await item.get_by_role("link").click()
    await chat.is_in("failed")
    await expect(chat.status).to_contain_text("it is not known whether the question arrived")
    assert scene.gate.generations == 0
    await chat.retry.click()
    await chat.is_in("completed")
    assert await chat.text() == await (await scene.follow(chat)).whole()
    assert scene.gate.generations == 1
