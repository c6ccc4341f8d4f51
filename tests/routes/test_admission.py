"""What clients see of the queue: heartbeats or a held back status while they wait, a refusal in its
own words, and nothing of it where no slot is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, FakeUpstream, answer, chunk, stream, token
from serving import Connection, Response, Server, request_bytes, serving, texts_of, until

from pyserve import ModelConfig
from pyserve.routes.context import CONTEXT

CHAT = "/v1/chat/completions"
KEPT = {"X-Conversation-Id": "c"}

ServeModel = Callable[..., Awaitable[Server]]


@pytest.fixture
async def serve_model(upstream: FakeUpstream) -> AsyncIterator[ServeModel]:
    """Starts a pyserve with one model of one slot at the fake upstream."""
    async with AsyncExitStack() as stack:

        async def start(model: dict[str, Any] | None = None, **settings: Any) -> Server:
            config = ModelConfig("m", **{"upstream": upstream.url, "slots": 1, **(model or {})})
            return await stack.enter_async_context(serving(models=[config], **settings))

        yield start


def by_header(request: web.Request) -> str:
    return request.headers.get("X-User", "")


def waiting(server: Server) -> int:
    return server.app[CONTEXT].scheduler.waiting


async def wait_for_waiting(server: Server, wanted: int) -> None:
    await until(lambda: waiting(server) == wanted)


def held(until_set: asyncio.Event) -> tuple[Any, ...]:
    """A generation that goes on until the event."""
    return (SSE_HEAD, chunk(token("a")), until_set, chunk(DONE), LAST_CHUNK)


async def begin(server: Server, **headers: str) -> Response:
    """A generation that has the slot."""
    response = await server.open(
        "POST", CHAT, {"X-Conversation-Id": "first", **headers}, json={"stream": True}
    )
    await response.read_until(token("a")[:-1])
    return response


# --- waiting


async def test_a_stream_that_waits_is_queued_gets_heartbeats_and_then_its_turn(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(status_grace_s=0.05, heartbeat_interval_s=0.02)
    end = asyncio.Event()
    upstream.play(held(end), stream(token("b"), DONE))
    await begin(server)
    second = await server.post("second")
    assert second.status == 200
    assert server.session("second").state == "queued"
    await second.read_until(b": ping\n: ping\n")
    assert len(upstream.exchanges) == 1
    end.set()
    assert texts_of(await second.read_to_end()) == ["b", "[DONE]"]
    assert waiting(server) == 0


async def test_a_turn_within_the_grace_has_the_upstreams_own_status(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model()
    end = asyncio.Event()
    upstream.play(held(end), answer(400, {"error": {"message": "no"}}))
    await begin(server)
    posting = asyncio.create_task(server.post("second"))
    await wait_for_waiting(server, 1)
    end.set()
    assert (await posting).status == 400


async def test_through_the_strict_proxy_nothing_is_sent_while_it_waits(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(status_grace_s=0.0, heartbeat_interval_s=0.01)
    end = asyncio.Event()
    upstream.play(held(end), answer(200, {"ok": True}))
    await begin(server)
    connection = await server.connect()
    await connection.send(request_bytes("POST", CHAT, (), b"{}"))
    await wait_for_waiting(server, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.fill()
    end.set()
    assert (await connection.response("POST")).status == 200


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset])
async def test_a_client_of_the_strict_proxy_that_leaves_leaves_the_queue(
    serve_model: ServeModel, upstream: FakeUpstream, leave: Any
) -> None:
    server = await serve_model()
    end = asyncio.Event()
    upstream.play(held(end))
    await begin(server)
    connection = await server.connect()
    await connection.send(request_bytes("POST", CHAT, (), b"{}"))
    await wait_for_waiting(server, 1)
    leave(connection)
    await wait_for_waiting(server, 0)
    assert len(upstream.exchanges) == 1


async def test_a_reader_that_leaves_a_kept_stream_leaves_it_in_the_queue(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(status_grace_s=0.0)
    end = asyncio.Event()
    upstream.play(held(end), stream(token("b"), DONE))
    await begin(server)
    (await server.post("second")).connection.close()
    await wait_for_waiting(server, 1)
    end.set()
    read = await server.fetch("GET", "/v1/stream/second")
    assert texts_of(read.body) == ["b", "[DONE]"]


# --- stopping


@pytest.mark.parametrize("grace_s", [0.0, 10.0], ids=["late", "in the grace"])
async def test_a_stop_takes_it_out_of_the_queue_at_once(
    serve_model: ServeModel, upstream: FakeUpstream, grace_s: float
) -> None:
    server = await serve_model(status_grace_s=grace_s)
    end = asyncio.Event()
    upstream.play(held(end))
    await begin(server)
    posting = asyncio.create_task(server.post("second"))
    await wait_for_waiting(server, 1)
    assert (await server.fetch("DELETE", "/v1/stream/second")).status == 204
    assert waiting(server) == 0
    second = await posting
    await second.read_to_end()
    if grace_s:
        assert (second.status, second.error["reason"]) == (400, "cancelled")
    else:
        assert second.body.endswith(b": end cancelled\n")
    assert len(upstream.exchanges) == 1


async def test_a_stop_of_the_running_one_gives_its_slot_to_the_next(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model()
    upstream.play(held(asyncio.Event()), stream(token("b"), DONE))
    await begin(server)
    posting = asyncio.create_task(server.post("second"))
    await wait_for_waiting(server, 1)
    await server.fetch("DELETE", "/v1/stream/first")
    assert texts_of(await (await posting).read_to_end()) == ["b", "[DONE]"]


async def test_at_shutdown_who_waits_is_told(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(status_grace_s=0.0)
    upstream.play(held(asyncio.Event()))
    await begin(server)
    second = await server.post("second")
    await wait_for_waiting(server, 1)
    stopping = asyncio.create_task(server.runner.cleanup())
    assert texts_of(await second.read_to_end()) == ["shutdown"]
    await stopping


# --- refusals


async def test_a_full_queue_is_429_with_retry_after_and_leaves_no_session(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(max_queue=1, status_grace_s=0.3)
    upstream.play(held(asyncio.Event()))
    await begin(server)
    await server.post("second")
    for headers in (KEPT, {}):
        refused = await server.fetch("POST", CHAT, headers, json={"stream": True})
        assert (refused.status, refused.error["reason"]) == (429, "queue_full")
        assert refused.error["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
    assert len(server.manager) == 2


async def test_an_owner_with_too_many_waiting_is_429_and_others_are_not(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(max_waiting_per_owner=1, status_grace_s=0.3, authenticate=by_header)
    end = asyncio.Event()
    upstream.play(held(end), stream(token("b"), DONE))
    await begin(server, **{"X-User": "x"})
    for conversation, user, status in (("2", "x", 200), ("3", "x", 429), ("3", "y", 200)):
        response = await server.post(conversation, X_User=user)
        assert response.status == status
    end.set()
    await wait_for_waiting(server, 0)


async def test_an_unknown_model_is_404_and_stops_no_live_stream(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model()
    end = asyncio.Event()
    upstream.play(held(end))
    first = await begin(server)
    for headers in ({"X-Conversation-Id": "first"}, {}):
        refused = await server.fetch("POST", CHAT, headers, json={"stream": True, "model": "x"})
        assert (refused.status, refused.error["reason"]) == (404, "model_not_found")
        assert refused.error["models"] == ["m"]
    end.set()
    assert texts_of(await first.read_to_end()) == ["a", "[DONE]"]


async def test_too_many_connections_are_503(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model(max_connections=1)
    end = asyncio.Event()
    upstream.play(held(end))
    first = await begin(server)
    refused = await server.fetch("GET", "/health")
    assert (refused.status, refused.error["reason"]) == (503, "too_many_connections")
    assert refused.headers["retry-after"] == "1"
    end.set()
    await first.read_to_end()
    assert (await server.fetch("GET", "/health")).status == 200


# --- what needs a slot


@pytest.mark.parametrize("path", ["/v1/completions", "/completion", "/v1/responses", "/infill"])
async def test_every_generating_route_needs_a_slot(
    serve_model: ServeModel, upstream: FakeUpstream, path: str
) -> None:
    server = await serve_model()
    end = asyncio.Event()
    upstream.play(held(end), answer(200, {"ok": True}))
    await begin(server)
    asking = asyncio.create_task(server.fetch("POST", path, json={}))
    await wait_for_waiting(server, 1)
    end.set()
    assert (await asking).json() == {"ok": True}


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/v1/messages/count_tokens"])
async def test_what_does_not_generate_needs_none(
    serve_model: ServeModel, upstream: FakeUpstream, path: str
) -> None:
    server = await serve_model(max_queue=0)
    upstream.play(held(asyncio.Event()), answer(200, {"ok": True}))
    await begin(server)
    assert (await server.fetch("POST", path, json={})).json() == {"ok": True}


# --- which upstream, and what it is told


async def test_requests_go_to_the_model_that_they_name(upstream: FakeUpstream) -> None:
    async with FakeUpstream() as other:
        models = [ModelConfig("a", upstream=upstream.url), ModelConfig("b", upstream=other.url)]
        upstream.play(answer(200, {"is": "a"}))
        other.play(answer(200, {"is": "b"}))
        async with serving(models=models) as server:
            for path in (CHAT, "/v1/embeddings", "/tokenize"):
                for body, name in (({"model": "a"}, "a"), ({"model": "b"}, "b"), ({}, "a")):
                    assert (await server.fetch("POST", path, json=body)).json() == {"is": name}
            for target, name in (("/props", "a"), ("/props?model=b", "b")):
                assert (await server.fetch("GET", target)).json() == {"is": name}
            assert (await server.fetch("POST", "/tokenize", json={"model": "c"})).status == 404
            assert (await server.fetch("GET", "/props?model=c")).status == 404


async def test_defaults_are_for_what_a_request_does_not_say(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model({"params": {"temperature": 0.1, "top_k": 7}})
    upstream.play(stream(DONE))
    for headers in (KEPT, {}):
        body = {"stream": True, "temperature": 0.9, "x": [1.0]}
        await server.fetch("POST", CHAT, headers, json=body)
    for exchange in upstream.exchanges:
        assert exchange.body == b'{"temperature":0.9,"top_k":7,"stream":true,"x":[1.0]}'


async def test_an_upstream_that_calls_the_model_otherwise_is_asked_in_its_words(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model({"upstream_model": "org/theirs"})
    upstream.play(stream(DONE))
    await server.fetch("POST", CHAT, KEPT, json={"stream": True, "model": "m"})
    await server.fetch("POST", "/v1/embeddings", json={"model": "m", "input": "x"})
    generated, embedded = upstream.exchanges
    assert generated.body == b'{"stream":true,"model":"org/theirs"}'
    assert embedded.body == b'{"model":"org/theirs","input":"x"}'


async def test_without_either_the_body_goes_as_it_came(
    serve_model: ServeModel, upstream: FakeUpstream
) -> None:
    server = await serve_model()
    upstream.play(stream(DONE))
    body = b' {"model" : "m", "stream":true, "big": 123456789012345678901234567890 }\n'
    for headers in (KEPT, {}):
        await server.fetch("POST", CHAT, headers, body)
    assert [exchange.body for exchange in upstream.exchanges] == [body, body]
