"""llama.cpp's own web UI, unchanged, in a real Chromium: ``pyserve serve --ui upstream``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from chromium import driver, launched, needs_chromium, new_profile
from cutting_proxy import CuttingProxy
from gate import Gate
from llama import wait_busy_slots
from playwright.async_api import Browser, BrowserContext, Page, expect
from process import Server, pyserve
from yarl import URL

if TYPE_CHECKING:
    from conftest import Generation

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_chromium]

TOKENS = 120
EARLY = 20

# A settings dialog's work: without a limit each generation fills the context.
LIMIT = f"""
    localStorage.setItem("LlamaUi.config", JSON.stringify({{ max_tokens: {TOKENS} }}));
    localStorage.setItem("LlamaUi.userOverrides", JSON.stringify(["max_tokens"]));
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with driver() as playwright, launched(playwright) as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def profile(browser: Browser) -> AsyncIterator[BrowserContext]:
    async with new_profile(browser) as context:
        yield context


class Chat:
    """A tab with llama.cpp's page."""

    def __init__(self, page: Page, generation: Generation) -> None:
        self.page = page
        self.answer = page.get_by_label("Assistant message with actions").locator(
            ".markdown-content"
        )
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        #: In the tabs and in the sidebar: a spinner that is a button.
        self.spinners = page.get_by_label("Stop generation")
        #: Every request to pyserve's stream routes.
        self.requests: list[str] = []
        self._generation = generation
        page.on("request", self._keep)

    def _keep(self, request: Any) -> None:
        if "/v1/stream" in request.url:
            self.requests.append(f"{request.method} {request.url.partition('/v1/')[2]}")

    async def ask(self) -> None:
        """Send a message; the conversation id that the page gives it is the generation's."""
        await self.page.get_by_placeholder("Type a message").fill("bado kele")
        async with self.page.expect_request("**/v1/chat/completions") as asking:
            await self.page.keyboard.press("Enter")
        self._generation.id = (await (await asking.value).all_headers())["x-conversation-id"]

    async def text(self) -> str:
        """What is shown of the answer."""
        return words(await self.answer.inner_text())

    async def shows(self, text: str) -> None:
        """Wait until the answer is this."""
        await expect(self.answer).to_have_text(words(text), use_inner_text=True)


def words(text: str) -> str:
    """As HTML has it: one space for any."""
    return " ".join(text.split())


@pytest.fixture
def open_chat(
    profile: BrowserContext, server: Server, generation: Generation
) -> Callable[..., Awaitable[Chat]]:
    async def open_page(url: str = server.url, *, limit: bool = True) -> Chat:
        if limit:
            await profile.add_init_script(LIMIT)
        chat = Chat(await profile.new_page(), generation)
        await chat.page.goto(url)
        return chat

    return open_page


OpenChat = Callable[..., Awaitable[Chat]]


async def begin(open_chat: OpenChat, gated: Gate, *where: str, **options: Any) -> Chat:
    """A page whose answer is held after its first tokens, and shows them."""
    gated.hold(after_events=EARLY)
    chat = await open_chat(*where, **options)
    await chat.ask()
    await expect(chat.answer).not_to_be_empty()
    return chat


async def look_up(generation: Generation) -> list[dict[str, Any]]:
    body = {"conversation_ids": [generation.id]}
    url = f"{generation.server_url}/v1/streams/lookup"
    async with generation.http.post(url, json=body) as answer:
        found: list[dict[str, Any]] = await answer.json()
        return found


async def test_reloaded_in_the_middle_it_goes_on_and_ends_complete(
    open_chat: OpenChat, gated: Gate, generation: Generation
) -> None:
    chat = await begin(open_chat, gated)
    async with chat.page.expect_response("**/v1/stream?**") as reading:
        await chat.page.reload()
    assert (await reading.value).status == 200
    assert chat.requests[-1] == f"GET stream?conv_id={generation.id}&from=0"
    await gated.open()
    text = await generation.text()
    assert len(text.split()) > TOKENS // 2
    await chat.shows(text)
    await expect(chat.spinners).to_have_count(0)
    await chat.page.reload()
    await chat.shows(text)
    assert gated.generations == 1


async def test_closed_in_the_middle_and_opened_after_the_end_it_shows_all(
    open_chat: OpenChat, gated: Gate, generation: Generation
) -> None:
    chat = await begin(open_chat, gated)
    url = chat.page.url
    await chat.page.close()
    await gated.open()
    text = await generation.text()
    again = await open_chat(url)
    await again.shows(text)


async def test_a_lost_connection_is_resumed_at_the_byte(
    open_chat: OpenChat, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    chat = await begin(open_chat, gated, wire.url)
    async with chat.page.expect_response("**/v1/stream?**"):
        await wire.break_all()
    (position,) = wire.positions
    await gated.open()
    log = await generation.log()
    assert log[: int(position)].endswith(b"\n")
    assert log[: int(position)].count(b"\ndata: ") == EARLY - 1
    await chat.shows(await generation.text())


async def test_heartbeats_keep_it_from_taking_a_silence_for_a_loss(
    open_chat: OpenChat, gated: Gate, generation: Generation
) -> None:
    chat = await begin(open_chat, gated)
    asked = list(chat.requests)
    (begun,) = await look_up(generation)
    silent_for_s = 4
    while (await look_up(generation))[0]["total_bytes"] < begun["total_bytes"] + silent_for_s * 7:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    # Looked at again after 3 s without a byte it would ask anew.
    await chat.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await gated.open()
    await chat.shows(await generation.text())
    assert [each for each in chat.requests[len(asked) :] if each.startswith("GET")] == []


async def slots(http: aiohttp.ClientSession, llama: Server) -> list[dict[str, Any]]:
    async with http.get(f"{llama.url}/slots") as answer:
        found: list[dict[str, Any]] = await answer.json()
        return found


async def test_stop_stops_the_slot(
    open_chat: OpenChat, gated: Gate, llama: Server, http: aiohttp.ClientSession, generation: Any
) -> None:
    await wait_busy_slots(http, llama.url, 0)
    chat = await begin(open_chat, gated, limit=False)
    (busy,) = [slot for slot in await slots(http, llama) if slot["is_processing"]]
    await chat.stop.click()
    await wait_busy_slots(http, llama.url, 0)
    (stopped,) = [slot for slot in await slots(http, llama) if slot["id"] == busy["id"]]
    assert stopped["n_prompt_tokens"] < stopped["n_ctx"] - 100  # by itself it ends at the context's
    await expect(chat.spinners).to_have_count(0)
    assert chat.requests[-1] == f"DELETE stream?conv_id={generation.id}"
    assert await look_up(generation) == []
    shown = await chat.text()
    await chat.page.reload()
    await chat.shows(shown)


async def test_the_sidebar_s_spinner_follows_the_lookup(
    open_chat: OpenChat, gated: Gate, generation: Generation
) -> None:
    chat = await begin(open_chat, gated)
    await chat.page.close()  # what another tab knows of it, it knows from pyserve
    other = await open_chat()
    await other.page.get_by_label("Expand navigation").click()
    sidebar = other.page.locator("aside, [data-slot=sidebar]").get_by_label("Stop generation")
    await expect(sidebar).to_have_count(1)
    await gated.open()
    await generation.log()
    await other.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(other.spinners).to_have_count(0)


async def test_with_several_models_its_ids_name_the_model(
    open_chat: OpenChat, gated: Gate, generation: Generation
) -> None:
    def to_router(props: dict[str, Any]) -> dict[str, Any]:
        return {**props, "role": "router"}

    def loaded(models: dict[str, Any]) -> dict[str, Any]:
        return {**models, "data": [{**m, "status": {"value": "loaded"}} for m in models["data"]]}

    gated.rewrites |= {"/props": to_router, "/v1/models": loaded}
    gated.hold(after_events=EARLY)
    chat = await open_chat()
    await chat.ask()
    assert "::" in generation.id
    await expect(chat.answer).not_to_be_empty()
    async with chat.page.expect_response("**/v1/stream?**"):
        await chat.page.reload()
    await gated.open()
    await chat.shows(await generation.text())
    assert gated.generations == 1
    assert json.dumps(await look_up(generation)).count(generation.id) == 1


async def test_pyserve_s_own_page_comes_back_to_who_had_llama_cpp_s(
    open_chat: OpenChat, gated: Gate, wire: CuttingProxy
) -> None:
    chat = await open_chat(wire.url)
    await chat.page.evaluate("navigator.serviceWorker.ready.then(() => null)")
    with pyserve("--upstream", gated.url) as own:
        # The same address, where another page lives now.
        url = URL(own.url)
        wire.target = (str(url.host), int(url.port or 0))
        await wire.break_all()
        await chat.page.goto(wire.url)  # from the service worker, for the last time
        await expect(chat.page).to_have_title("pyserve")
        left = await chat.page.evaluate("navigator.serviceWorker.getRegistrations()")
        assert left == []
