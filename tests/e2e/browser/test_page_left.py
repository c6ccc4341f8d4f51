"""A conversation that is left before its question was answered, and a server that is another one
when the connection is back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from chat_page import CLOSED_EARLY, Chat, until
from chromium import needs_chromium
from fake_upstream import DONE, FakeUpstream, answer, stream, token
from playwright.async_api import expect
from serving import serving

if TYPE_CHECKING:
    import aiohttp
    from conftest import OpenChat, Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

Answer = tuple[bytes | asyncio.Event, ...]


@asynccontextmanager
async def scripted(*answers: Answer) -> AsyncIterator[str]:
    """The address of a pyserve whose model gives these answers in turn."""
    async with FakeUpstream() as upstream:
        upstream.play(answer(200, {"data": [{"id": "scripted"}]}), *answers)
        async with serving(upstream=upstream.url) as server:
            host, port = server.runner.addresses[0][:2]
            yield f"http://{host}:{port}"


def item(chat: Chat, title: str) -> Any:
    """A conversation's place in the list."""
    return chat.page.locator("#conversations li", has_text=title)


async def test_left_before_the_head_of_its_answer_it_is_answered_all_the_same(
    open_chat: OpenChat, http: aiohttp.ClientSession
) -> None:
    answering = asyncio.Event()
    slow: Answer = (answering, *stream(token("the "), token("first"), DONE))
    async with scripted(slow, stream(token("second"), DONE)) as url:
        chat = await open_chat(url)
        await chat.ask("slow one")
        first_id = chat.conversation_id
        await until_known(http, url, first_id)
        await chat.page.get_by_role("button", name="New conversation").click()
        await chat.ask("quick one")
        await chat.is_in("completed")
        await expect(item(chat, "slow one").locator(".spinner")).to_be_visible()
        answering.set()
        await expect(item(chat, "slow one").locator(".spinner")).to_be_hidden()
        await item(chat, "slow one").get_by_role("link").click()
        await chat.is_in("completed")
        assert await chat.text() == "the first"


async def until_known(http: aiohttp.ClientSession, url: str, conversation_id: str) -> None:
    """Wait until the server has this question."""

    async def is_known() -> bool:
        request = {"conversation_ids": [conversation_id]}
        async with http.post(f"{url}/v1/streams/lookup", json=request) as found:
            return bool(await found.json())

    await until(is_known, "the question at the server")


async def test_come_back_to_before_the_head_of_its_answer_it_is_followed(
    open_chat: OpenChat, http: aiohttp.ClientSession
) -> None:
    answering = asyncio.Event()
    async with scripted((answering, *stream(token("once "), token("only"), DONE))) as url:
        chat = await open_chat(url)
        await chat.ask("slow one")
        await until_known(http, url, chat.conversation_id)
        await chat.page.get_by_role("button", name="New conversation").click()
        await item(chat, "slow one").get_by_role("link").click()
        await expect(chat.stop).to_be_visible()
        answering.set()
        await chat.is_in("completed")
        assert await chat.text() == "once only"


@pytest.mark.parametrize("is_opened", [True, False], ids=["opened", "in_the_list"])
async def test_an_answer_that_the_closed_tab_never_heard_of_is_found_at_the_server(
    scene: Scene, open_chat: OpenChat, http: aiohttp.ClientSession, is_opened: bool
) -> None:
    chat = await open_chat(scene.wire.url)
    request = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "stream": True}
    headers = {"X-Conversation-Id": "found-one"}
    address = f"{scene.server_url}/v1/chat/completions"
    async with http.post(address, json=request, headers=headers) as answered:
        await answered.read()
    await chat.page.evaluate(CLOSED_EARLY, "found-one")
    if is_opened:
        chat = await Chat.open(chat.page.context, scene.wire.url, "found-one")
    else:
        await chat.page.reload()
        found = chat.page.locator('li[data-conversation-id="found-one"]')
        await expect(found.locator(".spinner")).to_be_hidden()
        await found.get_by_role("link").click()
    await chat.is_in("completed")
    assert await chat.text() == await (await scene.follow(chat)).whole()
    assert scene.gate.generations == 1


def renamed(name: str) -> Any:
    """What a server with another model says of its models."""
    return lambda models: {**models, "data": [{**models["data"][0], "id": name}]}


async def test_a_server_that_came_back_with_another_model_is_asked_for_that_one(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat, log = await scene.begin(open_chat, 20, tokens=60)
    scene.gate.rewrites["/v1/models"] = renamed("another.gguf")
    await scene.wire.break_all()
    await expect(chat.page.get_by_test_id("model")).to_have_text("another.gguf")
    await scene.gate.open()
    await chat.is_in("completed")
    assert await chat.text() == await log.whole()


async def test_a_tab_that_is_shown_again_names_the_model_that_is_there_now(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat = await open_chat(scene.wire.url)
    scene.gate.rewrites["/v1/models"] = renamed("another.gguf")
    await chat.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(chat.page.get_by_test_id("model")).to_have_text("another.gguf")
    async with chat.page.expect_request("**/v1/chat/completions*") as asked:
        await chat.ask()
    request = await asked.value
    assert json.loads(request.post_data or "")["model"] == "another.gguf"


async def test_deleted_before_the_head_of_its_answer_it_is_not_generated(
    open_chat: OpenChat, http: aiohttp.ClientSession
) -> None:
    async with scripted((asyncio.Event(),)) as url:
        chat = await open_chat(url)
        await chat.ask("deleted at once")
        deleted_id = chat.conversation_id
        await until_known(http, url, deleted_id)
        await chat.page.get_by_role("button", name="New conversation").click()
        remove = item(chat, "deleted at once").get_by_role("button")
        await remove.click()
        await remove.click()
        await expect(item(chat, "deleted at once")).to_have_count(0)

        async def is_gone() -> bool:
            request = {"conversation_ids": [deleted_id]}
            async with http.post(f"{url}/v1/streams/lookup", json=request) as found:
                return not await found.json()

        await until(is_gone, "the end of the generation")
