"""The page and what goes wrong around it: networks, servers, memory; and a place that isn't the
root of a host."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from chat_page import Log, until
from chromium import needs_chromium
from cutting_proxy import Cut, cutting_proxy
from gate import gate
from playwright.async_api import BrowserContext, expect
from process import Server, environment, pyserve_command
from serving import serving
from tap import tap
from yarl import URL

import pyserve

if TYPE_CHECKING:
    import aiohttp
    from conftest import OpenChat, Scene, SetScene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

TOKENS = 100
EVENTS = TOKENS + 3

OFFLINE_S = 10.0


async def test_offline_for_ten_seconds_and_back(
    scene: Scene, open_chat: OpenChat, profile: BrowserContext
) -> None:
    chat, log = await scene.begin(open_chat, 20, tokens=TOKENS)
    text = log.text

    # A browser that is told to be offline keeps the connections that it has.
    await profile.set_offline(True)
    await scene.wire.refuse()
    await chat.is_in("retrying")
    await expect(chat.status).to_have_text("Lost the connection. Trying again")
    await scene.gate.open(after_events=60)
    await asyncio.sleep(OFFLINE_S)
    assert await chat.text() == text
    await chat.is_in("retrying", "connecting")

    await scene.wire.listen()
    await profile.set_offline(False)
    await chat.is_in("reattached", "streaming")
    await expect(chat.status).to_have_text(re.compile("^Streaming, reattached at byte "))
    await chat.shows(await log.has(60))
    await scene.gate.open()
    await chat.is_in("completed")
    assert await chat.text() == await log.whole()
    assert scene.gate.generations == 1


async def test_a_connection_that_falls_silent_is_noticed_and_replaced(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat, log = await scene.begin(open_chat, 20, tokens=TOKENS)
    shown = log.text
    scene.wire.mute("/v1/chat/completions")
    await scene.let(60, log)
    assert await chat.text() == shown
    await chat.shows(log.text)
    assert "The connection went silent. Trying again" in await chat.said()
    await scene.gate.open()
    await chat.is_in("completed")
    assert await chat.text() == await log.whole()
    assert scene.wire.positions


async def test_a_network_that_is_slow_and_cuts_anywhere(scene: Scene, open_chat: OpenChat) -> None:
    async with tap(scene.server_url, pause_s=0.008) as slow:  # at most 64 kB/s, 512 bytes at a time
        chat = await open_chat(slow.url, tokens=TOKENS)
        await chat.ask()
        log = await scene.follow(chat)
        text = await log.whole()
        assert len(await chat.text()) < len(text)  # it is not there yet
        await chat.is_in("completed")
        assert await chat.text() == text


class Restarted:
    """A pyserve that can be killed, and be started again behind the same address."""

    def __init__(self, upstream_url: str) -> None:
        options = ("--port", "0", "--drain-timeout", "0", "--upstream", upstream_url)
        self._command = pyserve_command("serve", *options)
        self.server = Server(self._command, environment())

    @property
    def address(self) -> tuple[str, int]:
        url = URL(self.server.url)
        assert url.host is not None
        assert url.port is not None
        return url.host, url.port

    def end(self, how: signal.Signals) -> None:
        self.server.send(how)
        self.server.wait()

    def start(self) -> None:
        self.server = Server(self._command, environment())


@contextmanager
def restarted(upstream_url: str) -> Iterator[Restarted]:
    it = Restarted(upstream_url)
    try:
        yield it
    finally:
        it.server.__exit__()


@pytest.mark.parametrize(
    ("how", "state", "words"),
    [
        (signal.SIGKILL, "gone", "The server no longer has this answer: it was restarted"),
        (signal.SIGTERM, "failed", "Failed. The server was shut down."),
    ],
    ids=["killed", "shut_down"],
)
async def test_a_restart_is_explained_and_retry_asks_again(
    llama: Server,
    http: aiohttp.ClientSession,
    open_chat: OpenChat,
    how: signal.Signals,
    state: str,
    words: str,
) -> None:
    async with gate(llama.url) as the_gate:
        with restarted(the_gate.url) as it:
            async with cutting_proxy(it.address) as wire:
                the_gate.hold(after_events=20)
                chat = await open_chat(wire.url, tokens=TOKENS)
                await chat.ask()
                log = await Log.follow(http, it.server.url, chat)
                await chat.shows(await log.has(20))
                text = log.text
                ending = asyncio.to_thread(it.end, how)
                await asyncio.gather(ending, log.close())
                it.start()
                wire.target = it.address
                await chat.is_in(state)
                await expect(chat.status).to_contain_text(words)
                if how == signal.SIGKILL:
                    assert "Lost the connection. Trying again" in await chat.said()
                assert await chat.text() == text
                await chat.page.reload()
                await chat.is_in(state)
                assert await chat.text() == text

                await the_gate.open()
                await chat.retry.click()
                await chat.is_in("completed")
                again = await Log.follow(http, it.server.url, chat)
                assert await chat.text() == await again.whole()
                assert len(again.pieces) == EVENTS
                assert the_gate.generations == 2


async def test_bytes_that_were_dropped_are_shown_as_a_gap_and_it_goes_on(
    set_scene: SetScene, open_chat: OpenChat
) -> None:
    scene = await set_scene(max_session_bytes=4096)
    chat, log = await scene.begin(open_chat, 10, tokens=TOKENS)
    await scene.wire.refuse()
    await chat.is_in("retrying")
    for events in range(12, 81, 2):  # so that the log's other reader stays within what is kept
        await scene.let(events, log)
    lost_from = log.pieces[9][0]
    await scene.wire.listen()
    await expect(chat.gaps).to_have_count(1)
    lost_bytes = int(await chat.gaps.get_attribute("data-gap") or 0)
    assert lost_bytes > 60 * 200
    note = await chat.gaps.text_content() or ""
    assert note == (
        f"Here {lost_bytes:,} bytes of the stream are missing: the server had dropped them."
    )
    at = len("".join(text for end, text in log.pieces if end <= lost_from))

    def expected() -> str:
        kept = log.text_without(lost_from, lost_bytes)
        return kept[:at] + note + kept[at:]

    for events in range(82, EVENTS + 1):
        await scene.let(events, log)
        await chat.shows(expected())
    await chat.is_in("completed")
    await log.whole()
    assert await chat.text() == expected()
    await chat.page.reload()
    await chat.is_in("completed")
    assert await chat.text() == expected()


async def test_under_a_path_prefix_of_somebody_else_s_application(
    scene: Scene, open_chat: OpenChat, http: aiohttp.ClientSession
) -> None:
    app = web.Application()
    pyserve.setup(app, pyserve.Config(upstream=scene.gate.url), prefix="/some/llm")
    async with serving(app) as server:
        host, port = server.runner.addresses[0][:2]
        url = f"http://{host}:{port}/some/llm"
        scene.gate.hold(after_events=20)
        chat = await open_chat(url, tokens=TOKENS)  # without the slash
        await chat.ask()
        log = await Log.follow(http, url, chat)
        await chat.shows(await log.has(20))
        await chat.page.reload()
        other = await open_chat(f"{url}/", chat.conversation_id)
        await scene.let(40, log, chat, other)
        await other.stop.click()
        text = await log.whole()
        for each in (chat, other):
            await each.is_in("cancelled")
            assert await each.text() == text


async def test_an_upstream_that_refuses_is_explained_and_retry_asks_again(
    scene: Scene, open_chat: OpenChat
) -> None:
    scene.gate.refusals.append(
        web.json_response({"error": {"code": 500, "message": "out of luck"}}, status=500)
    )
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.ask()
    await chat.is_in("failed")
    await expect(chat.status).to_contain_text("Failed. The model's server reported an error.")
    await chat.retry.click()
    await chat.is_in("completed")
    assert await chat.text() == await (await scene.follow(chat)).whole()


async def test_a_model_that_is_still_loading_is_waited_for(
    scene: Scene, open_chat: OpenChat
) -> None:
    loading = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    scene.gate.refusals.append(web.json_response({"error": loading}, status=503))
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    await chat.ask()
    await chat.is_in("completed")
    assert "The model is still loading. Trying again" in await chat.said()
    assert await chat.text() == await (await scene.follow(chat)).whole()
    assert scene.gate.generations == 2


async def test_a_question_that_was_never_answered_is_asked_once_more_not_twice(
    scene: Scene, open_chat: OpenChat
) -> None:
    chat = await open_chat(scene.wire.url, tokens=TOKENS)
    scene.wire.cuts.extend([Cut(after=0, how="reset")] * 6)
    await scene.wire.break_all()
    await chat.ask()

    async def was_asked() -> bool:
        return scene.gate.generations > 0

    await until(was_asked, "a generation")
    scene.wire.cuts.clear()
    await chat.is_in("completed")
    assert await chat.text() == await (await scene.follow(chat)).whole()
    assert scene.gate.generations == 1
