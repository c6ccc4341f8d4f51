"""Upstreams that are asked how they are: who is ill gets no work, and recovers by himself."""

from __future__ import annotations

import asyncio
from typing import Any

from fake_upstream import DONE, RESET, FakeUpstream, answer, stream, token
from serving import Server, serving, texts_of, until

from pyserve import ModelConfig
from pyserve.routes.context import CONTEXT

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:1"

#: Says that it is well, and to /props how many slots it has.
WELL = answer(200, {"total_slots": 1})
LOADING = answer(503, {"error": {"message": "Loading model", "type": "unavailable_error"}})


def state(server: Server) -> str:
    serving_version = server.app[CONTEXT].models.known[0].serving
    assert serving_version is not None
    return serving_version.health.state


async def wait_for_state(server: Server, wanted: str) -> None:
    await until(lambda: state(server) == wanted)


async def status_of(server: Server) -> str:
    return (await server.fetch("GET", "/v1/models")).json()["data"][0]["status"]


def polling(url: str, **settings: Any) -> Any:
    return serving(
        models=[ModelConfig("m", upstream=url)], **{"health_interval_s": 0.05} | settings
    )


async def test_an_upstream_that_is_not_there_is_503_with_retry_after_everywhere() -> None:
    async with polling(NOBODY) as server:
        await wait_for_state(server, "ill")
        for headers in ({"X-Conversation-Id": "c"}, {}):
            refused = await server.fetch("POST", CHAT, headers, json={"stream": True})
            assert (refused.status, refused.error["reason"]) == (503, "model_unhealthy")
            assert refused.error["cause"] == "upstream_unreachable"
            assert int(refused.headers["retry-after"]) >= 1
        assert (await server.fetch("GET", "/ready")).status == 503
        assert await status_of(server) == "unhealthy"
        assert (await server.fetch("GET", "/health")).status == 200
        assert len(server.manager) == 0


async def test_a_sole_upstream_without_a_name_is_watched_as_well() -> None:
    async with serving(upstream=NOBODY, health_interval_s=0.05) as server:
        await wait_for_state(server, "ill")
        refused = await server.fetch("POST", CHAT, json={})
        assert (refused.status, refused.error["reason"]) == (503, "model_unhealthy")


async def test_it_recovers_by_itself(upstream: FakeUpstream) -> None:
    upstream.play(answer(500))
    async with polling(upstream.url) as server:
        await wait_for_state(server, "ill")
        upstream.play(WELL)
        await wait_for_state(server, "well")
        assert (await server.fetch("GET", "/ready")).status == 200
        assert await status_of(server) == "serving"


async def test_while_it_loads_its_model_it_says_so(upstream: FakeUpstream) -> None:
    upstream.play(LOADING)
    async with polling(upstream.url) as server:
        await wait_for_state(server, "ill")
        refused = await server.fetch("POST", CHAT, json={})
        assert (refused.status, refused.error["reason"]) == (503, "model_loading")


async def test_one_of_two_models_is_enough_to_be_ready(upstream: FakeUpstream) -> None:
    upstream.play(WELL)
    models = [ModelConfig("gone", upstream=NOBODY), ModelConfig("here", upstream=upstream.url)]
    async with serving(models=models, health_interval_s=0.05) as server:
        await wait_for_state(server, "ill")
        assert (await server.fetch("GET", "/ready")).status == 200
        assert (await server.fetch("POST", CHAT, json={"model": "gone"})).status == 503
        assert (await server.fetch("POST", CHAT, json={"model": "here"})).status == 200


async def test_its_slots_are_those_that_it_tells(upstream: FakeUpstream) -> None:
    upstream.play(WELL)
    async with polling(upstream.url, health_interval_s=3600.0, max_queue=0) as server:
        await wait_for_state(server, "well")
        held = asyncio.Event()
        upstream.play((held, *stream(token("a"), DONE)))
        first = asyncio.create_task(server.post("first"))
        await upstream.exchange(2)
        assert (await server.fetch("POST", CHAT, json={})).error["reason"] == "queue_full"
        held.set()
        await (await first).read_to_end()


async def test_one_lost_connection_is_looked_into_and_nobody_else_suffers(
    upstream: FakeUpstream,
) -> None:
    upstream.play(WELL)
    async with polling(upstream.url, health_interval_s=3600.0) as server:
        await wait_for_state(server, "well")
        upstream.play((RESET,), WELL, WELL, stream(token("b"), DONE))
        lost = await server.fetch("POST", CHAT, json={})
        assert (lost.status, lost.error["reason"]) == (502, "upstream_lost")
        assert state(server) == "suspect"
        posted = await server.post("c")
        assert texts_of(await posted.read_to_end()) == ["b", "[DONE]"]


async def test_an_upstream_that_goes_away_is_noticed_by_the_first_who_needs_it() -> None:
    async with FakeUpstream() as upstream:
        upstream.play(WELL)
        async with polling(upstream.url, health_interval_s=3600.0) as server:
            await wait_for_state(server, "well")
            await upstream.__aexit__(None, None, None)
            gone = await server.fetch("POST", CHAT, json={})
            assert (gone.status, gone.error["reason"]) == (502, "upstream_unreachable")
            await wait_for_state(server, "ill")
            assert (await server.fetch("POST", CHAT, json={})).status == 503


async def test_who_looks_again_and_again_fills_no_log(caplog: Any) -> None:
    async with polling(NOBODY, health_interval_s=0.01) as server:
        await wait_for_state(server, "ill")
        await asyncio.sleep(0.1)
    told = [record.getMessage() for record in caplog.records if record.name == "pyserve"]
    assert told == ["m 1 is not healthy: upstream_unreachable"]
