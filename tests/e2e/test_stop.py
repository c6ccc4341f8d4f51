"""Stop on a real llama.cpp: the upstream connection is closed and the slot is free, at once.

The bounds asserted here are generous, for busy machines; what was measured is printed.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import quote

import aiohttp
import pytest
from llama import LONG, SLOTS, chat, new_conversation, wait_busy_slots
from process import Server, pyserve
from tap import tap
from yarl import URL

COUNT = 200 if os.environ.get("PYSERVE_SOAK") else 20

# A generation of LONG tokens takes four times as long, so none ends by itself within it.
BOUND_S = 0.5


def now() -> float:
    return asyncio.get_running_loop().time()


def describe(times_s: list[float]) -> str:
    median, largest = statistics.median(times_s), max(times_s)
    return f"median {median * 1000:.1f} ms, max {largest * 1000:.1f} ms of {len(times_s)}"


class Conversation:
    """One conversation of a server, by its URLs."""

    def __init__(self, http: aiohttp.ClientSession, server_url: str) -> None:
        self._http = http
        self._server_url = server_url
        self.id = new_conversation()
        self._url = URL(f"{server_url}/v1/stream/{quote(self.id, safe='')}", encoded=True)

    @asynccontextmanager
    async def generate(self, seed: int = 1) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._http.post(
            f"{self._server_url}/v1/chat/completions",
            json=chat(LONG, seed=seed),
            headers={"X-Conversation-Id": self.id},
        ) as answer:
            yield answer

    async def stop(self, **query: str) -> None:
        async with self._http.delete(self._url.with_query(query)) as answer:
            assert answer.status == 204

    async def read_status(self) -> int:
        async with self._http.get(self._url) as answer:
            return answer.status


async def test_a_stop_frees_the_slot_of_a_running_generation(
    llama: Server,
    served_llama: Server,
    http: aiohttp.ClientSession,
    tell: Callable[[str], None],
) -> None:
    times_s = []
    for _ in range(COUNT):
        conversation = Conversation(http, served_llama.url)
        async with conversation.generate() as answer:
            await answer.content.readuntil(b"\n\n")
            stopped_at = now()
            await conversation.stop()
            await wait_busy_slots(http, llama.url, 0)
            times_s.append(now() - stopped_at)
            assert (await answer.read()).endswith(b"\n\n: end cancelled\n")
        assert await conversation.read_status() == 404
    tell(f"from DELETE to a free slot: {describe(times_s)}")
    assert statistics.median(times_s) < BOUND_S


async def test_a_stop_closes_the_connection_to_the_upstream(
    llama: Server, http: aiohttp.ClientSession, tell: Callable[[str], None]
) -> None:
    times_s = []
    async with tap(llama.url) as wire:
        with pyserve("--upstream", wire.url) as server:
            for number in range(COUNT):
                conversation = Conversation(http, server.url)
                async with conversation.generate(seed=number) as answer:
                    await answer.content.readuntil(b"\n\n")
                    stopped_at = now()
                    await conversation.stop()
                    left_at = await wire.find(f'"seed": {number},').client_left_at
                    times_s.append(left_at - stopped_at)
    tell(f"from DELETE to a closed upstream connection: {describe(times_s)}")
    assert statistics.median(times_s) < BOUND_S


async def test_a_stop_with_keep_leaves_the_log_of_what_was_generated(
    llama: Server, served_llama: Server, http: aiohttp.ClientSession
) -> None:
    conversation = Conversation(http, served_llama.url)
    async with conversation.generate() as answer:
        await answer.content.readuntil(b"\n\n")
        await conversation.stop(keep="true")
    await wait_busy_slots(http, llama.url, 0)
    assert await conversation.read_status() == 200


@asynccontextmanager
async def all_slots_busy(llama: Server, http: aiohttp.ClientSession) -> AsyncIterator[None]:
    """Generations of somebody else, straight at llama.cpp; they end when this is left."""
    url = f"{llama.url}/v1/chat/completions"
    async with AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await stack.enter_async_context(http.post(url, json=chat(LONG)))
        await wait_busy_slots(http, llama.url, SLOTS)
        yield
    await wait_busy_slots(http, llama.url, 0)


async def test_a_stop_while_waiting_for_a_slot_answers_the_post_and_leaves_the_queue(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    # Unasked, so that pyserve knows of no slots: the queue is llama.cpp's own.
    settings = ("--status-grace", "30", "--health-interval", "0")
    async with tap(llama.url) as wire:
        with pyserve("--upstream", wire.url, *settings) as server:
            async with all_slots_busy(llama, http):
                conversation = Conversation(http, server.url)
                async with asyncio.TaskGroup() as group:
                    asked = group.create_task(ask(conversation))
                    await wire.connected.wait()
                    stopped_at = now()
                    await conversation.stop()
                    (connection,) = wire.connections
                    assert await connection.client_left_at - stopped_at < BOUND_S
                status, error = asked.result()
                assert (status, error["reason"]) == (400, "cancelled")
                assert "cancelled" in error["message"]
                assert connection.answer == b""  # llama.cpp had not begun


async def ask(conversation: Conversation) -> tuple[int, dict[str, str]]:
    async with conversation.generate() as answer:
        return answer.status, (await answer.json())["error"]


async def test_a_stop_while_waiting_for_a_slot_after_the_status_was_sent_ends_the_stream(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    limits = ("--status-grace", "0", "--heartbeat-interval", "0.05")
    with pyserve("--upstream", llama.url, *limits) as server:
        async with all_slots_busy(llama, http):
            conversation = Conversation(http, server.url)
            async with conversation.generate() as answer:
                assert answer.status == 200
                assert await answer.content.readline() == b": ping\n"
                await conversation.stop()
                assert (await answer.read()).endswith(b": end cancelled\n")


@pytest.mark.parametrize("conversation_id", ["", None])
async def test_a_client_without_a_conversation_stops_its_generation_by_leaving(
    llama: Server,
    served_llama: Server,
    http: aiohttp.ClientSession,
    conversation_id: str | None,
) -> None:
    headers = {} if conversation_id is None else {"X-Conversation-Id": conversation_id}
    url = f"{served_llama.url}/v1/chat/completions"
    async with http.post(url, json=chat(LONG), headers=headers) as answer:
        await answer.content.readuntil(b"\n\n")
        answer.close()
    left_at = now()
    await wait_busy_slots(http, llama.url, 0)
    assert now() - left_at < BOUND_S
