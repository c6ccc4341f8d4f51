"""The page under the hands: where the focus goes, what keys and taps do, what colours say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from chat_page import Chat
from chromium import needs_chromium
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, FakeUpstream, answer, chunk, stream, token
from paced_upstream import paced_upstream
from playwright.async_api import Browser, Route, expect
from serving import serving

if TYPE_CHECKING:
    from conftest import OpenChat, Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

COMPOSING_ESCAPE = """
    (it) => it.dispatchEvent(
      new KeyboardEvent("keydown", { key: "Escape", isComposing: true, bubbles: true }))
"""

# What forced colours leave of these: the width of a border, or the colour that says something.
LOOKS = """
    () => {
      const of = (selector) => getComputedStyle(document.querySelector(selector));
      return {
        stop: of("#stop").borderTopWidth,
        dot: of(".dot").backgroundColor,
        ground: getComputedStyle(document.body).backgroundColor,
        current: of("nav a[aria-current]").backgroundColor,
        other: of("nav a:not([aria-current])").backgroundColor,
        spinner: [of(".spinner:not([hidden])").borderTopColor,
          of(".spinner:not([hidden])").borderLeftColor],
      };
    }
"""


async def test_when_the_button_under_the_focus_goes_the_message_box_has_it(
    scene: Scene, open_chat: OpenChat
) -> None:
    scene.gate.hold(after_events=20)
    chat = await open_chat(scene.wire.url, tokens=60)
    await chat.ask()  # by a click on Send
    await expect(chat.send).to_be_hidden()
    await expect(chat.prompt).to_be_focused()
    await chat.stop.focus()
    await scene.gate.open()
    await chat.is_in("completed")
    await expect(chat.stop).to_be_hidden()
    await expect(chat.prompt).to_be_focused()


async def test_esc_within_an_input_method_s_composition_stops_nothing(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat, log = await scene.begin(open_chat, 20, tokens=60)
    await chat.prompt.evaluate(COMPOSING_ESCAPE)
    await scene.let(40, log, chat)
    await scene.gate.open()
    await chat.is_in("completed")
    await log.whole()
    assert log.end == "completed"


async def test_a_stop_that_did_not_reach_the_server_is_told_again(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat, log = await scene.begin(open_chat, 20, tokens=60)
    refused = asyncio.Event()

    async def refuse_once(route: Route) -> None:
        if route.request.method == "DELETE" and not refused.is_set():
            refused.set()
            await route.fulfill(status=502, body="not now")
        else:
            await route.continue_()

    await chat.page.route("**/v1/stream?*", refuse_once)
    await chat.stop.click()
    await chat.is_in("cancelled")
    assert "The server could not be told to stop. Trying again" in await chat.said()
    assert await chat.text() == await log.whole()
    assert log.end == "cancelled"


async def test_a_code_block_that_was_scrolled_stays_so_while_it_grows_and_when_more_is_asked(
    open_chat: OpenChat,
) -> None:
    going_on = asyncio.Event()
    long_line = token("```js\n" + "x" * 500 + "\n")
    rest = (*map(chunk, (token("y\n"), DONE)), LAST_CHUNK)
    answered: tuple[bytes | asyncio.Event, ...] = (SSE_HEAD, chunk(long_line), going_on, *rest)
    async with FakeUpstream() as upstream:
        models = answer(200, {"data": [{"id": "scripted"}]})
        upstream.play(models, answered, stream(token("again"), DONE))
        async with serving(upstream=upstream.url) as server:
            host, port = server.runner.addresses[0][:2]
            chat = await open_chat(f"http://{host}:{port}", plain=False)
            await chat.ask()
            block = chat.page.locator("pre")
            await block.focus()
            await block.evaluate("(it) => { it.scrollLeft = 200; }")
            going_on.set()
            await chat.is_in("completed")
            await expect(block).to_be_focused()
            await chat.ask("more")
            await chat.is_in("completed")
            await expect(chat.answer).to_have_text("again")
            assert await block.evaluate("(it) => it.scrollLeft") == 200


async def test_a_draft_is_there_after_a_reload_and_gone_when_it_was_sent(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat = await open_chat(scene.wire.url, tokens=10)
    await chat.prompt.fill("a draft\nof two lines")
    await chat.page.reload()
    await expect(chat.prompt).to_have_value("a draft\nof two lines")
    await chat.send.click()
    await chat.is_in("completed")
    await chat.page.reload()
    await expect(chat.prompt).to_have_value("")


async def test_an_address_that_names_no_conversation_is_a_new_one(
    scene: Scene, open_chat: OpenChat
) -> None:
    for fragment in ("..", "a\nb", "x" * 256):
        chat = await open_chat(scene.wire.url, fragment)
        await chat.ask("hello")
        await expect(chat.article).to_be_visible()
        assert chat.conversation_id != fragment
        await chat.stop.click()
        await chat.is_in("cancelled", "completed")


async def test_on_a_phone_the_list_goes_away_for_the_conversation_that_is_shown_too(
    browser: Browser, scene: Scene
) -> None:
    context = await browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True)
    try:
        chat = await Chat.open(context, scene.wire.url)
        await chat.set_options(plain=True, max_tokens=10)
        await chat.ask()
        await chat.is_in("completed")
        await chat.page.get_by_role("button", name="Conversations").click()
        await chat.page.locator("#conversations a[aria-current]").tap()
        await expect(chat.page.locator("#new")).to_be_hidden()
        await expect(chat.answer).to_be_visible()
    finally:
        await context.close()


async def test_forced_colours_take_no_meaning_away(browser: Browser) -> None:
    context = await browser.new_context(forced_colors="active", color_scheme="dark")
    async with paced_upstream(100) as upstream, serving(upstream=upstream.url) as server:
        host, port = server.runner.addresses[0][:2]
        try:
            chat = await Chat.open(context, f"http://{host}:{port}")
            await chat.set_options(plain=True, max_tokens=10)
            await chat.ask("one")
            await chat.is_in("completed")
            await chat.page.get_by_role("button", name="New conversation").click()
            await chat.set_options(plain=True, max_tokens=100_000)
            await chat.ask("two")
            await chat.is_in("streaming")
            looks = await chat.page.evaluate(LOOKS)
        finally:
            await context.close()
    assert looks["stop"] == "1px"
    assert looks["dot"] != looks["ground"]
    assert looks["current"] != looks["other"]
    assert looks["spinner"][0] != looks["spinner"][1]
