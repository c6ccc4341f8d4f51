"""The page loses nothing: reloaded, in two tabs, stopped from elsewhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from chromium import needs_chromium
from fake_upstream import DONE, FakeUpstream, answer, stream, token
from llama import LONG, wait_busy_slots
from playwright.async_api import expect
from process import Server
from serving import serving

if TYPE_CHECKING:
    from conftest import OpenChat, Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

TOKENS = 100
#: One event says the role, one the reason of the end, one is [DONE].
EVENTS = TOKENS + 3


@pytest.mark.parametrize(
    "shown", [0, 3, EVENTS // 2, EVENTS - 1], ids=["before", "early", "middle", "at_the_end"]
)
async def test_reloaded_it_goes_on_where_it_was(
    scene: Scene, open_chat: OpenChat, shown: int
) -> None:
    chat, log = await scene.begin(open_chat, shown, tokens=TOKENS)
    await chat.page.reload()
    await chat.is_in("streaming", "reattached")
    await chat.shows(log.text)
    await expect(chat.article).to_have_attribute("aria-busy", "true")
    await scene.gate.open()
    await chat.is_in("completed")
    assert await chat.text() == await log.whole()
    assert len(log.pieces) == EVENTS
    assert scene.gate.generations == 1


async def test_reloaded_after_the_end_it_shows_all_and_asks_for_nothing(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.ask()
    await chat.is_in("completed")
    text = await (await scene.follow(chat)).whole()
    assert await chat.text() == text
    asked = len(scene.wire.requests)
    await chat.page.reload()
    await chat.is_in("completed")
    assert await chat.text() == text
    await expect(chat.page.get_by_test_id("model")).not_to_have_text("…")
    assert not [line for line in scene.wire.requests[asked:] if "/v1/stream" in line]
    assert scene.gate.generations == 1


async def test_reloaded_before_its_question_was_answered_it_asks_no_second_time(
    open_chat: OpenChat,
) -> None:
    answering = asyncio.Event()
    async with FakeUpstream() as upstream:
        models = answer(200, {"data": [{"id": "scripted"}]})
        upstream.play(models, (answering, *stream(token("once "), token("only"), DONE)))
        async with serving(upstream=upstream.url) as server:
            host, port = server.runner.addresses[0][:2]
            chat = await open_chat(f"http://{host}:{port}")
            await chat.ask()
            await upstream.exchange(1)
            await chat.page.reload()
            await expect(chat.article).to_have_attribute("aria-busy", "true")
            answering.set()
            await chat.is_in("completed")
            assert await chat.text() == "once only"
            asked = [each for each in upstream.exchanges if each.method == "POST"]
            assert len(asked) == 1


async def test_reloaded_again_and_again_it_is_complete(scene: Scene, open_chat: OpenChat) -> None:
    scene.gate.hold(after_events=1)
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.ask()
    log = await scene.follow(chat)
    for events in range(1, EVENTS, 9):
        await scene.gate.open(after_events=events)
        # Its scripts have just run; the stream has not begun, or just.
        await chat.page.reload(wait_until="domcontentloaded")
    await scene.gate.open()
    await chat.is_in("completed")
    assert await chat.text() == await log.whole()
    assert scene.gate.generations == 1


async def test_a_second_tab_follows_and_so_does_one_opened_after_the_first_is_closed(
    scene: Scene, open_chat: OpenChat
) -> None:
    first, log = await scene.begin(open_chat, 20, tokens=TOKENS)
    second = await open_chat(scene.wire.url, first.conversation_id)
    await scene.let(40, log, first, second)
    await first.page.close()
    third = await open_chat(scene.wire.url, second.conversation_id)
    await scene.let(60, log, second, third)
    await scene.gate.open()
    text = await log.whole()
    for chat in (second, third):
        await chat.is_in("completed")
        assert await chat.text() == text
    assert scene.gate.generations == 1


async def test_a_question_asked_in_one_tab_is_followed_by_the_other(
    scene: Scene, open_chat: OpenChat
) -> None:
    scene.gate.hold(after_events=20)
    first = await open_chat(scene.wire.url, tokens=TOKENS)
    await first.ask("the first question")
    second = await open_chat(scene.wire.url, first.conversation_id)
    await scene.gate.open()
    await asyncio.gather(first.is_in("completed"), second.is_in("completed"))
    scene.gate.hold(after_events=20)
    await second.ask("the second question")
    log = await scene.follow(second)
    await expect(first.page.get_by_test_id("question")).to_have_count(2)
    await scene.let(20, log, first, second)
    await scene.gate.open()
    text = await log.whole()
    for chat in (first, second):
        await chat.is_in("completed")
        assert await chat.text() == text
    assert scene.gate.generations == 2


async def test_stop_in_the_other_tab_ends_it_for_both_and_frees_the_slot(
    scene: Scene, open_chat: OpenChat, llama: Server
) -> None:
    await wait_busy_slots(scene.http, llama.url, 0)
    first, log = await scene.begin(open_chat, 20, tokens=LONG)
    second = await open_chat(scene.wire.url, first.conversation_id)
    await scene.let(30, log, first, second)
    await wait_busy_slots(scene.http, llama.url, 1)
    await second.stop.click()
    await wait_busy_slots(scene.http, llama.url, 0)
    text = await log.whole()
    assert log.end == "cancelled"
    for chat in (first, second):
        await chat.is_in("cancelled")
        await expect(chat.status).to_have_text("Stopped")
        await expect(chat.stop).to_be_hidden()
        await expect(chat.send).to_be_visible()
        assert await chat.text() == text
    await first.page.reload()
    await first.is_in("cancelled")
    assert await first.text() == text
    await expect(first.page.locator("#conversations .spinner:visible")).to_have_count(0)
