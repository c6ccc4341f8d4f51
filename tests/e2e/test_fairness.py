"""The queue in front of a real llama.cpp with four slots: a heavy owner never delays a light one by
more than the generations that run already."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web
from llama import SLOTS, chat
from process import Server
from serving import serving, until

from pyserve.routes.context import CONTEXT

HEAVY_REQUESTS = 100
TOKENS = 200


def by_header(request: web.Request) -> str:
    return request.headers.get("X-User", "")


async def test_one_request_beside_a_hundred_of_another_owner_waits_for_one_turn(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    finished = 0

    async def ask(url: str, user: str) -> None:
        nonlocal finished
        body = chat(TOKENS, stream=False)
        async with http.post(url, json=body, headers={"X-User": user}) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
        finished += 1

    async with serving(upstream=llama.url, authenticate=by_header, health_interval_s=1.0) as server:
        scheduler = server.app[CONTEXT].scheduler
        url = f"{server.url}/v1/chat/completions"
        heavy = [asyncio.create_task(ask(url, "heavy")) for _ in range(HEAVY_REQUESTS)]
        await until(lambda: finished > 0 and scheduler.waiting > HEAVY_REQUESTS // 2)
        (model,) = server.app[CONTEXT].models.known
        assert model.serving is not None
        assert model.serving.slots == SLOTS  # llama.cpp told so
        assert model.serving.running == SLOTS

        finished_before = finished
        headers = {"X-User": "light", "X-Conversation-Id": "light"}
        async with http.post(url, json=chat(TOKENS), headers=headers) as answer:
            await answer.content.readuntil(b"\n\n")
            overtaken_by = finished - finished_before
            assert answer.status == 200
        # Those that ended together while it was on its way, and those of the one turn that it
        # waits for. In a plain queue it would be more than half a hundred.
        assert overtaken_by < 2 * SLOTS
        await asyncio.gather(*heavy)
        assert scheduler.waiting == 0
