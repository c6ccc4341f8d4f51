"""The server stops: generations may finish, readers are told, and no loss looks like an end."""

import asyncio

import orjson
import pytest
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, STALL, FakeUpstream, chunk, token
from serving import Connection, Response, Server, events_of, request_bytes, texts_of, until

import pyserve.app
from pyserve.app import drain

pytestmark = pytest.mark.usefixtures("delivery_path")

SHUTDOWN = {
    "code": 503,
    "type": "overloaded_error",
    "message": "The server is shutting down",
    "reason": "shutdown",
}


async def shut_down(server: Server) -> float:
    """Shut the server down, as ``pyserve serve`` does after its drain; tells how long it took."""
    begun = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        await server.runner.cleanup()
    return asyncio.get_running_loop().time() - begun


async def stalled(server: Server, target: str, version: str) -> tuple[Connection, Response]:
    connection = await server.connect(receive_buffer_bytes=4096)
    await connection.send(request_bytes("GET", target, version=version))
    return connection, await connection.response()


@pytest.fixture
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds are promised, and held by a test; the others need not wait for them."""
    monkeypatch.setattr(pyserve.app, "SHUTDOWN_DRAIN_S", 0.2)


# --- shutdown


async def test_live_streams_get_the_error_event_and_a_clean_end(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a") + token("b")[:9]), STALL))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    reading = await server.open("GET", "/v1/stream/c")
    took_s = await shut_down(server)
    for reader in (posted, reading):
        await reader.read_to_end()
        assert texts_of(reader.body) == ["a", "shutdown"]
        assert orjson.loads(events_of(reader.body)[-1].data) == {"error": SHUTDOWN}
        assert reader.body.endswith(b"\n\n: end failed shutdown\n")
        assert reader.end == "clean"
    await (await upstream.exchange()).wait_closed()
    assert took_s < 1.5  # nobody had to be waited for


async def test_the_error_event_has_the_dialect_of_its_route(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(b'event: ping\ndata: {"type": "ping"}\n\n'), STALL))
    headers = {"X-Conversation-Id": "c"}
    posted = await server.open("POST", "/v1/messages", headers, json={"stream": True})
    await posted.read_until(b"\n\n")
    await shut_down(server)
    event = events_of(await posted.read_to_end())[-1]
    assert event.name == "error"
    assert orjson.loads(event.data) == {"type": "error", "error": SHUTDOWN}


async def test_a_stream_with_a_producer_of_its_own_is_failed_too(server: Server) -> None:
    stopped = asyncio.Event()
    session = server.manager.create_or_replace("own", on_end=lambda _: stopped.set())
    session.append(token("a"))
    reading = await server.open("GET", "/v1/stream/own")
    await shut_down(server)
    assert texts_of(await reading.read_to_end()) == ["a", "shutdown"]
    assert stopped.is_set()


async def test_a_post_whose_status_is_held_back_is_told(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    posting = asyncio.create_task(server.post("c"))
    exchange = await upstream.exchange()
    await shut_down(server)
    posted = await posting
    assert posted.status == 200
    assert texts_of(await posted.read_to_end()) == ["shutdown"]
    assert posted.end == "clean"
    await exchange.wait_closed()


async def test_readers_have_two_seconds_to_drain(server: Server) -> None:
    session = server.manager.create_or_replace("c")
    for _ in range(3000):
        session.append(token("x" * 900))
    _, never = await stalled(server, "/v1/stream/c", "1.1")
    _, late = await stalled(server, "/v1/stream/c", "1.1")
    stopping = asyncio.create_task(shut_down(server))
    await asyncio.sleep(1.0)
    assert texts_of(await late.read_to_end())[-1] == "shutdown"
    assert late.end == "clean"
    assert 1.8 < await stopping < 4
    await never.read_to_end()
    assert never.end == "reset"


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "over"])
async def test_who_has_not_drained_is_reset(server: Server, version: str, live: bool) -> None:
    session = server.manager.create_or_replace("c")
    for _ in range(3000):
        session.append(token("x" * 900))
    if not live:
        session.finalize()
    _, response = await stalled(server, "/v1/stream/c", version)
    await shut_down(server)
    await response.read_to_end()
    assert response.end == "reset"
    assert b": end" not in response.body


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_an_answer_of_the_strict_proxy_is_reset(
    server: Server, upstream: FakeUpstream, version: str
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    response = await server.open("POST", "/v1/completions", json={"stream": True}, version=version)
    await response.read_until(token("a"))
    await shut_down(server)
    assert await response.read_to_end() == token("a")
    assert response.end == "reset"
    await (await upstream.exchange()).wait_closed()


async def test_without_streams_it_is_over_at_once(server: Server) -> None:
    await server.connect()
    kept = await server.open("GET", "/health")
    await kept.read_to_end()
    assert await shut_down(server) < 1


# --- drain: before it, for as long as it is allowed


async def test_drain_lets_generations_finish(server: Server, upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), LAST_CHUNK))
    posted = await server.post("c")
    draining = asyncio.create_task(drain(server.app, 10))
    await asyncio.sleep(0.05)
    assert not draining.done()
    go_on.set()
    async with asyncio.timeout(5):
        await draining
    assert texts_of(await posted.read_to_end()) == ["a", "b", "[DONE]"]
    assert posted.end == "clean"
    assert server.session("c").state == "completed"


async def test_drain_lets_the_strict_proxys_generations_finish(
    server: Server, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(DONE), LAST_CHUNK))
    response = await server.open("POST", "/v1/completions", json={"stream": True})
    draining = asyncio.create_task(drain(server.app, 10))
    await asyncio.sleep(0.05)
    assert not draining.done()
    go_on.set()
    assert await response.read_to_end() == token("a") + DONE
    async with asyncio.timeout(5):
        await draining
    assert response.end == "clean"


async def test_drain_gives_up_after_its_time_and_shutdown_does_the_rest(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await server.post("c")
    async with asyncio.timeout(5):
        await drain(server.app, 0.05)
    assert server.session("c").is_live
    await shut_down(server)
    assert texts_of(await posted.read_to_end()) == ["a", "shutdown"]


async def test_while_draining_nothing_starts_but_everything_can_be_read_and_stopped(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await server.post("c", Idempotency_Key="k")
    await posted.read_until(b"\n\n")
    draining = asyncio.create_task(drain(server.app, 10))
    await asyncio.sleep(0)

    for headers in ({"X-Conversation-Id": "d"}, {"X-Conversation-Id": "c"}, {}):
        refused = await server.fetch("POST", "/v1/completions", headers, json={"stream": True})
        assert refused.status == 503
        assert refused.error == SHUTDOWN
        assert refused.headers["retry-after"] == "1"
    ready = await server.fetch("GET", "/ready")
    assert (ready.status, ready.error) == (503, SHUTDOWN)
    assert (await server.fetch("GET", "/health")).status == 200
    assert len(upstream.exchanges) == 1

    attached = await server.post("c", X_Stream_Conflict="attach")
    repeated = await server.post("c", Idempotency_Key="k")
    read = await server.open("GET", "/v1/stream/c")
    for reader in (attached, repeated, read):
        assert texts_of(await reader.read_until(b"\n\n")) == ["a"]
    assert (await server.fetch("DELETE", "/v1/stream/c")).status == 204
    async with asyncio.timeout(5):
        await draining
    await until(lambda: len(server.manager) == 0)
