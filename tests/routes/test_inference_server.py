"""A whole server as a library: its settings, its start and its end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiohttp
import pytest
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, FakeUpstream, answer, chunk, token

from pyserve import Config, ConfigError, InferenceServer, ModelConfig

QUIET = {"health_interval_s": 0.0, "port": 0}


@pytest.fixture
async def server(upstream: FakeUpstream) -> InferenceServer:
    """Has one model, m, at the fake upstream; not started."""
    return InferenceServer(models=[ModelConfig("m", upstream=upstream.url)], **QUIET)


async def ask(server: InferenceServer, **headers: str) -> bytes:
    async with aiohttp.ClientSession(server.url) as http:
        body = {"stream": True}
        async with http.post("/v1/chat/completions", json=body, headers=headers) as response:
            return await response.read()


def test_settings_are_those_of_a_config() -> None:
    server = InferenceServer(Config(port=1), max_connections=7, request_timeout_s=9.0)
    assert server.config == Config(port=1, max_connections=7, request_timeout_s=9.0)
    with pytest.raises(
        ConfigError, match="no key 'max_conections', did you mean 'max_connections'"
    ):
        InferenceServer(max_conections=7)
    with pytest.raises(ConfigError, match="request_timeout_s is -1"):
        InferenceServer(request_timeout_s=-1)


async def test_it_serves_from_its_start_to_its_stop(
    server: InferenceServer, upstream: FakeUpstream
) -> None:
    upstream.play(answer(200, {"ok": True}))
    async with server:
        assert await ask(server) == b'{"ok":true}'
        url = server.url
    with pytest.raises(RuntimeError, match="not running"):
        assert server.url
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(url)
    await server.stop()  # twice does nothing


async def test_where_it_listens_may_be_said_at_the_start(server: InferenceServer) -> None:
    await server.start("127.0.0.1", 0)
    try:
        assert server.url.startswith("http://127.0.0.1:")
        with pytest.raises(RuntimeError, match="running already"):
            await server.start()
    finally:
        await server.stop()


async def test_a_start_that_fails_leaves_nothing_behind(server: InferenceServer) -> None:
    async with asyncio.timeout(10), server:
        port = int(server.url.rpartition(":")[2])
        other = InferenceServer(demo=True)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await other.start("127.0.0.1", port)
        await other.start("127.0.0.1", 0)
        await other.stop()


async def test_a_stop_lets_what_runs_finish(
    server: InferenceServer, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(DONE), LAST_CHUNK))
    await server.start()
    asking = asyncio.create_task(ask(server, **{"X-Conversation-Id": "c"}))
    await upstream.exchange()
    stopping = asyncio.create_task(server.stop())
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(stopping)
    assert not stopping.done()
    go_on.set()
    assert b"data: [DONE]" in await asking
    await stopping


async def test_without_time_it_ends_what_runs(
    server: InferenceServer, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), asyncio.Event()))
    await server.start()
    asking = asyncio.create_task(ask(server, **{"X-Conversation-Id": "c"}))
    await upstream.exchange()
    await server.stop(drain_timeout_s=0)
    assert b": end failed shutdown\n" in await asking


async def test_models_may_come_after_the_start(upstream: FakeUpstream) -> None:
    async with InferenceServer(**QUIET) as server:
        assert b"model_not_found" in await ask(server)
        upstream.play(
            answer(200),
            answer(200),
            answer(200, {"total_slots": 1}),
            answer(200, {"choices": []}),
            answer(200, {"ok": True}),
        )
        server.register_model(ModelConfig("m", upstream=upstream.url))
        await server.wait_model("m")
        assert await ask(server) == b'{"ok":true}'
        with pytest.raises(ConfigError, match="There is a model of this name"):
            server.register_model(ModelConfig("m", upstream=upstream.url))
        server.register_model(ModelConfig("n", upstream="http://127.0.0.1:1"))
        with pytest.raises(ConfigError, match="is not healthy"):
            await server.wait_model("n")
        with pytest.raises(ConfigError, match="There is no such model"):
            await server.swap_model(ModelConfig("x", demo=True))
