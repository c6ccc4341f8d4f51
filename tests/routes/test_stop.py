"""DELETE: stops a generation in every state, and frees the upstream at once."""

import asyncio

import orjson
import pytest
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from serving import Response, Serve, Server, texts_of, until

pytestmark = pytest.mark.usefixtures("delivery_path")

STOP = "/v1/stream/c"


async def upstream_freed_ms(server: Server, upstream: FakeUpstream, target: str = STOP) -> float:
    """Stop, and measure until the upstream sees its connection closed."""
    exchange = await upstream.exchange()
    begun = asyncio.get_running_loop().time()
    stopped = await server.fetch("DELETE", target)
    assert (stopped.status, stopped.body) == (204, b"")
    freed_ms = (await exchange.wait_closed() - begun) * 1000
    print(f"upstream connection closed {freed_ms:.1f} ms after the DELETE (promised: 100)")
    return freed_ms


async def assert_gone(server: Server) -> None:
    response = await server.fetch("GET", STOP)
    assert (response.status, response.error["reason"]) == (404, "stream_not_found")
    assert len(server.manager) == 0


def assert_cancelled_before_it_began(posted: Response) -> None:
    assert posted.status == 400
    assert posted.error == {
        "code": 400,
        "type": "invalid_request_error",
        "message": "The generation was cancelled before it began",
        "reason": "cancelled",
    }


async def test_a_streaming_generation_is_stopped_and_its_log_dropped(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a") + token("b")[:9]), STALL))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    reading = await server.open("GET", STOP)
    await upstream_freed_ms(server, upstream)
    for reader in (posted, reading):
        assert texts_of(await reader.read_to_end()) == ["a"]
        assert reader.body.endswith(b"\n\n: end cancelled\n")
        assert reader.end == "clean"
    await assert_gone(server)


async def test_everything_up_to_the_stop_is_still_read(
    server: Server, upstream: FakeUpstream
) -> None:
    texts = [f"{n} " + "x" * 1000 for n in range(3000)]
    upstream.play((SSE_HEAD, chunk(b"".join(map(token, texts))), STALL))
    posted = await server.post("c")
    await until(lambda: server.session("c").snapshot().end_offset > 3_000_000)
    await upstream_freed_ms(server, upstream)
    assert texts_of(await posted.read_to_end()) == texts
    assert posted.end == "clean"


async def test_a_generation_whose_status_is_held_back_is_stopped(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    posting = asyncio.create_task(server.post("c"))
    await upstream_freed_ms(server, upstream)
    assert_cancelled_before_it_began(await (await posting).whole())
    await assert_gone(server)


async def test_a_queued_generation_beyond_its_grace_is_stopped(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(status_grace_s=0.0)
    upstream.play((STALL,))
    posted = await server.post("c")
    assert posted.status == 200
    assert server.session("c").state == "queued"
    await upstream_freed_ms(server, upstream)
    assert await posted.read_to_end() == b": end cancelled\n"
    await assert_gone(server)


async def test_a_generation_whose_prompt_is_being_read_is_stopped(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, STALL))
    posted = await server.post("c")
    await upstream_freed_ms(server, upstream)
    assert await posted.read_to_end() == b": end cancelled\n"
    await assert_gone(server)


async def test_a_request_that_is_still_on_its_way_to_the_upstream_is_stopped(serve: Serve) -> None:
    connected: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()
    closed = asyncio.Event()
    received = 0

    class Deaf(asyncio.Protocol):
        """Takes the connection and reads nothing."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()
            connected.set_result(transport)

        def data_received(self, data: bytes) -> None:
            nonlocal received
            received += len(data)

        def connection_lost(self, exc: Exception | None) -> None:
            closed.set()

    body = orjson.dumps({"stream": True, "prompt": "x" * 10_000_000})
    deaf = await asyncio.get_running_loop().create_server(Deaf, "127.0.0.1", 0)
    async with deaf:
        server = await serve(upstream=f"http://127.0.0.1:{deaf.sockets[0].getsockname()[1]}")
        headers = {"X-Conversation-Id": "c"}
        posting = asyncio.create_task(server.fetch("POST", "/v1/completions", headers, body))
        transport = await connected
        await server.fetch("DELETE", STOP)
        assert_cancelled_before_it_began(await posting)
        transport.resume_reading()
        async with asyncio.timeout(20):
            await closed.wait()
        assert received < len(body)


async def test_a_stream_that_is_over_is_dropped(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    await (await server.post("c")).whole()
    assert (await server.fetch("DELETE", STOP)).status == 204
    await assert_gone(server)


async def test_an_unknown_stream_is_204_and_so_is_a_second_stop(server: Server) -> None:
    server.manager.create_or_replace("c")
    for target in (STOP, STOP, "/v1/stream/never", "/v1/stream?conv_id=never", STOP + "?keep=true"):
        response = await server.fetch("DELETE", target)
        assert (response.status, response.body) == (204, b"")


async def test_the_id_is_taken_from_the_query_too(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, STALL))
    posted = await server.post("c")
    await upstream_freed_ms(server, upstream, "/v1/stream?conv_id=c")
    await posted.read_to_end()
    await assert_gone(server)


async def test_a_stop_is_for_one_conversation_only(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    others = [await server.post(name) for name in ("c::m", "c/", "C")]
    await server.post("c")
    await server.fetch("DELETE", STOP)
    assert server.manager.get("c") is None
    for other in others:
        await other.read_until(b"\n\n")
        assert server.session(other.headers["x-conversation-id"]).is_live


# --- keep=true


async def test_keep_stops_but_keeps_the_log(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    await upstream_freed_ms(server, upstream, STOP + "?keep=true")
    await posted.read_to_end()
    assert posted.end == "clean"
    response = await server.fetch("GET", STOP)
    assert (response.status, response.body) == (200, posted.body)
    assert texts_of(response.body) == ["a"]
    assert server.session("c").state == "cancelled"


async def test_keep_changes_nothing_of_a_stream_that_is_over(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(token("a"), DONE))
    posted = await (await server.post("c")).whole()
    assert (await server.fetch("DELETE", STOP + "?keep=true")).status == 204
    assert server.session("c").state == "completed"
    assert (await server.fetch("GET", STOP)).body == posted.body


async def test_keep_with_a_status_held_back_answers_400_and_keeps_a_log_without_events(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    posting = asyncio.create_task(server.post("c"))
    await upstream_freed_ms(server, upstream, STOP + "?keep=true")
    assert_cancelled_before_it_began(await (await posting).whole())
    assert (await server.fetch("GET", STOP)).status == 204


@pytest.mark.parametrize("query", ["keep=false", "keep=", "keep", "keep=True", "keep=1"])
async def test_only_keep_true_keeps(server: Server, query: str) -> None:
    server.manager.create_or_replace("c").append(token("a"))
    assert (await server.fetch("DELETE", f"{STOP}?{query}")).status == 204
    await assert_gone(server)


# --- If-Match


async def test_if_match_stops_that_session_only(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    old = (await server.post("c")).headers["x-stream-epoch"]
    posted = await server.post("c")
    new = posted.headers["x-stream-epoch"]
    for target in (STOP, STOP + "?keep=true"):
        response = await server.fetch("DELETE", target, {"If-Match": f'"{old}"'})
        assert response.status == 412
        assert response.error == {
            "epoch": new,
            "code": 412,
            "type": "conflict_error",
            "message": "The conversation holds another stream than If-Match names",
            "reason": "epoch_mismatch",
        }
    assert server.session("c").is_live
    assert (await server.fetch("DELETE", STOP, {"If-Match": f'"{new}"'})).status == 204
    await posted.read_to_end()
    await assert_gone(server)


async def test_if_match_where_nothing_is_there_is_204(server: Server) -> None:
    assert (await server.fetch("DELETE", STOP, {"If-Match": '"abc"'})).status == 204


@pytest.mark.parametrize("value", ["abc", 'W/"{}"', "{}", '"', ""])
async def test_an_if_match_that_does_not_name_the_epoch_stops_nothing(
    server: Server, value: str
) -> None:
    session = server.manager.create_or_replace("c")
    response = await server.fetch("DELETE", STOP, {"If-Match": value.format(session.epoch)})
    assert response.status == 412
    assert session.is_live


# --- a DELETE and a POST


async def test_a_stop_never_hits_a_later_post(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    for _ in range(20):
        first = await server.post("c")
        stopping = asyncio.create_task(server.fetch("DELETE", STOP))
        posting = asyncio.create_task(server.post("c"))
        assert (await stopping).status == 204
        second = await posting
        await first.read_to_end()
        live = server.manager.get("c")
        if live is None:  # the POST was first: it is what was stopped
            assert second.status in (200, 400)
            await second.read_to_end()
        else:
            assert second.status == 200
            assert live.epoch == second.headers["x-stream-epoch"]
            assert live.is_live


async def test_after_a_stop_the_conversation_starts_anew(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL), stream(token("b"), DONE))
    first = await server.post("c")
    await server.fetch("DELETE", STOP)
    second = await (await server.post("c")).whole()
    assert texts_of(second.body) == ["b", "[DONE]"]
    assert second.headers["x-stream-epoch"] > first.headers["x-stream-epoch"]
