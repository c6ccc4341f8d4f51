"""The strict proxy: requests that keep nothing, and the routes that may pass."""

import asyncio
from typing import Any

import orjson
import pytest
from fake_upstream import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    SSE_HEAD_UNTIL_CLOSE,
    STALL,
    FakeUpstream,
    answer,
    chunk,
    stream,
    token,
)
from serving import Connection, Serve, Server, request_bytes

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b'{"stream": true}'),
        ({"X-Conversation-Id": ""}, b'{"stream": true}'),
        ({"X-Conversation-Id": "c"}, b'{"stream": false}'),
        ({"X-Conversation-Id": "c"}, b"{}"),
    ],
)
async def test_without_an_id_or_a_stream_nothing_is_kept_or_added(
    server: Server, upstream: FakeUpstream, headers: dict[str, str], body: bytes
) -> None:
    events = b"id: 1\nretry: 5\ndata: x\r\n\r\n:\n\n" + DONE
    upstream.play(stream(events))
    response = await server.fetch("POST", CHAT, headers, body)
    assert (response.status, response.body, response.end) == (200, events, "clean")
    assert not [name for name in response.headers if name.startswith("x-stream")]
    assert "x-conversation-id" not in response.headers
    assert len(server.manager) == 0
    assert upstream.exchanges[0].body == body


async def test_an_answer_passes_as_it_is_with_its_status(
    server: Server, upstream: FakeUpstream
) -> None:
    body = b'{ "id": 1.0, "x": "\xff" }'
    upstream.play(answer(201, body, kind="application/json; charset=x"))
    response = await server.fetch("POST", "/v1/completions", json={})
    assert (response.status, response.body, response.end) == (201, body, "clean")
    assert response.headers["content-type"] == "application/json; charset=x"


async def test_an_answer_without_a_body_passes(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(b"HTTP/1.1 204 No Content\r\n\r\n")
    response = await server.fetch("POST", "/v1/completions", json={})
    assert (response.status, response.body, response.end) == (204, b"", "clean")


async def test_tokens_pass_as_they_come(server: Server, upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(DONE), LAST_CHUNK))
    response = await server.open("POST", CHAT, json={"stream": True})
    assert await response.read_until(token("a")) == token("a")
    go_on.set()
    assert await response.read_to_end() == token("a") + DONE


async def test_an_answer_that_ends_with_its_connection_passes_whole(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD_UNTIL_CLOSE, token("a"), DONE))
    response = await server.fetch("POST", CHAT, json={"stream": True})
    assert (response.body, response.end) == (token("a") + DONE, "clean")


# --- clients that leave


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset])
@pytest.mark.parametrize("script", [(STALL,), (SSE_HEAD, STALL), (SSE_HEAD, chunk(DONE), STALL)])
async def test_a_client_that_leaves_closes_the_upstream_connection(
    server: Server, upstream: FakeUpstream, script: tuple[Any, ...], leave: Any
) -> None:
    upstream.play(script)
    connection = await server.connect()
    await connection.send(request_bytes("POST", CHAT, (), b'{"stream": true}'))
    exchange = await upstream.exchange()
    if len(script) > 2:
        await (await connection.response()).read_until(DONE)
    leave(connection)
    await exchange.wait_closed()


async def test_a_client_that_takes_nothing_does_not_hold_the_upstream_for_ever(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(write_timeout_s=0.2)
    upstream.play((SSE_HEAD, chunk(b"x" * 20_000_000), STALL))
    connection = await server.connect(receive_buffer_bytes=4096)
    await connection.send(request_bytes("POST", CHAT, (), b'{"stream": true}'))
    response = await connection.response()
    await (await upstream.exchange()).wait_closed()
    await response.read_to_end()
    assert response.end == "reset"


async def test_no_byte_is_sent_while_the_upstream_is_silent(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(status_grace_s=0.0, heartbeat_interval_s=0.01)
    answers = asyncio.Event()
    upstream.play((answers, answer(429, {"error": {"message": "busy"}})))
    connection = await server.connect()
    await connection.send(request_bytes("POST", CHAT, (), b'{"stream": true}'))
    await upstream.exchange()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await connection.fill()
    answers.set()
    assert (await connection.response()).status == 429


# --- headers


SENT = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "gzip, br",
    "Anthropic-Version": "2023-06-01",
    "Authorization": "Bearer client",
    "Content-Type": "application/json; charset=utf-8",
    "Cookie": "sid=client",
    "Forwarded": "for=1.2.3.4",
    "Idempotency-Key": "k",
    "Keep-Alive": "timeout=5",
    "Last-Event-ID": "abc-5",
    "OpenAI-Beta": "x",
    "Origin": "http://localhost",
    "Proxy-Authorization": "Basic client",
    "Referer": "http://localhost/secret",
    "TE": "trailers",
    "Traceparent": "00-1-2-3",
    "User-Agent": "tester",
    "X-Api-Key": "client",
    "X-Conversation-Id": "c",
    "X-Forwarded-For": "1.2.3.4",
    "X-Stream-Conflict": "replace",
    "X-Stream-Token": "t",
}


@pytest.mark.parametrize("stream_it", [True, False], ids=["kept", "strict proxy"])
async def test_the_upstream_sees_only_what_is_meant_for_it(
    serve: Serve, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, stream_it: bool
) -> None:
    monkeypatch.setenv("PYSERVE_UPSTREAM_KEY", "ours")
    server = await serve()
    upstream.play(stream(DONE))
    body = orjson.dumps({"stream": stream_it})
    await server.fetch("POST", CHAT + "?conv_id=c&token=t", SENT, body)
    (exchange,) = upstream.exchanges
    assert exchange.target == CHAT
    host = exchange.headers.pop("host")
    assert upstream.url == f"http://{host}"
    assert exchange.headers.pop("content-length", None) == str(len(body))
    assert exchange.headers.pop("connection") == "close"
    assert exchange.headers == {
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "anthropic-version": "2023-06-01",
        "authorization": "Bearer ours",
        "content-type": "application/json; charset=utf-8",
        "openai-beta": "x",
        "traceparent": "00-1-2-3",
        "user-agent": "tester",
    }


async def test_without_a_key_of_its_own_no_credentials_are_sent(
    serve: Serve, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSERVE_UPSTREAM_KEY", raising=False)
    server = await serve()
    upstream.play(stream(DONE))
    await server.fetch("POST", CHAT, SENT, b"{}")
    assert "authorization" not in upstream.exchanges[0].headers
    assert "x-api-key" not in upstream.exchanges[0].headers


async def test_the_key_may_come_from_a_file(serve: Serve, upstream: FakeUpstream, tmp_path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    server = await serve(upstream_key_file=tmp_path / "key")
    upstream.play(stream(DONE))
    await server.fetch("POST", CHAT, (), b"{}")
    assert upstream.exchanges[0].headers["authorization"] == "Bearer from a file"


async def test_the_client_sees_only_what_is_meant_for_it(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(
        answer(
            200,
            b"[]",
            kind="application/json",
            Access_Control_Allow_Origin="*",
            Connection="close, X-Hop",
            Keep_Alive="timeout=5, max=100",
            Server="llama.cpp",
            Set_Cookie="upstream=1",
            WWW_Authenticate="Bearer",
            X_Conversation_Id="theirs",
            X_Hop="1",
            X_Powered_By="secret",
        )
    )
    response = await server.fetch("GET", "/v1/models")
    assert set(response.headers) - {"date", "server", "x-request-id"} == {
        "content-type",
        "transfer-encoding",
    }
    assert "llama" not in response.headers["server"]


# --- the allow-list


PASS = [
    ("GET", "/v1/models"),
    ("GET", "/props"),
    ("GET", "/slots"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/apply-template"),
    ("POST", "/v1/embeddings"),
]


@pytest.mark.parametrize(("method", "target"), PASS)
async def test_read_only_and_stateless_routes_pass(
    server: Server, upstream: FakeUpstream, method: str, target: str
) -> None:
    upstream.play(answer(200, {"ok": True}))
    body = None if method == "GET" else b"not even JSON"
    response = await server.fetch(method, target + "?a=%2F&b=+", (), body)
    assert (response.status, response.json()) == (200, {"ok": True})
    (exchange,) = upstream.exchanges
    assert (exchange.method, exchange.target) == (method, target + "?a=%2F&b=+")
    assert exchange.body == (body or b"")


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/props", 405),
        ("POST", "/slots/0?action=erase", 404),
        ("POST", "/lora-adapters", 405),
        ("POST", "/models/load", 404),
        ("POST", "/models/unload", 404),
        ("GET", "/metrics", 404),
        ("GET", "/v1/models/../../admin", 404),
        ("GET", "/v1/models/x", 404),
        ("GET", "/slots/", 404),
        ("GET", "http://127.0.0.1:1/anything", 404),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_nothing_else_reaches_the_upstream(
    server: Server, upstream: FakeUpstream, method: str, target: str, status: int
) -> None:
    upstream.play(answer(200))
    response = await server.fetch(method, target)
    assert response.status == status
    assert response.error["reason"] in ("not_found", "method_not_allowed")
    assert not upstream.exchanges


async def test_redirects_are_not_followed(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(answer(307, Location="/props"))
    for method, target in PASS:
        response = await server.fetch(method, target, (), b"{}" if method == "POST" else None)
        assert (response.status, response.error["reason"]) == (502, "upstream_invalid")
        assert "location" not in response.headers
    assert len(upstream.exchanges) == len(PASS)


async def test_errors_of_passed_routes_have_the_one_shape(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(answer(501, {"error": {"message": "not supported", "type": "not_supported"}}))
    response = await server.fetch("GET", "/slots")
    assert response.status == 501
    assert response.error == {
        "upstream_type": "not_supported",
        "code": 501,
        "type": "upstream_error",
        "message": "not supported",
        "reason": "upstream_error",
    }


# --- /health and /ready


async def test_health_is_the_processs_own(serve: Serve) -> None:
    server = await serve(upstream="http://127.0.0.1:1")
    response = await server.fetch("GET", "/health")
    assert (response.status, response.json()) == (200, {"status": "ok"})


async def test_ready_follows_the_upstream(server: Server, upstream: FakeUpstream) -> None:
    loading = answer(503, {"error": {"message": "Loading model", "type": "unavailable_error"}})
    upstream.play(loading, answer(200, {"status": "ok"}))
    response = await server.fetch("GET", "/ready")
    assert response.status == 503
    assert response.error["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "1"
    assert (await server.fetch("GET", "/ready")).status == 200
    assert {exchange.target for exchange in upstream.exchanges} == {"/health"}


async def test_an_upstream_without_health_is_asked_for_its_models(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(answer(404), answer(200, {"data": []}))
    assert (await server.fetch("GET", "/ready")).status == 200
    assert [exchange.target for exchange in upstream.exchanges] == ["/health", "/v1/models"]


async def test_not_ready_while_the_upstream_is_not_there(serve: Serve) -> None:
    server = await serve(upstream="http://127.0.0.1:1")
    assert (await server.fetch("GET", "/ready")).status == 503
