"""POST with a conversation id: what is started, what it answers, what the log holds."""

import asyncio
from contextlib import suppress

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
from serving import Serve, Server, events_of, request_bytes, texts_of, until

import pyserve

ROUTES = {
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/completions": b"data:[DONE]\n\n",
    "/completion": b'data: {"content":"","stop":true}\n\n',
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
}


@pytest.mark.parametrize("route", ROUTES)
async def test_every_generating_route_streams_to_its_terminator(
    server: Server, upstream: FakeUpstream, route: str
) -> None:
    upstream.play(stream(token("a"), ROUTES[route]))
    posted = await server.fetch("POST", route, {"X-Conversation-Id": "c"}, json={"stream": True})
    assert (posted.status, posted.end) == (200, "clean")
    assert len(events_of(posted.body)) == 2
    assert posted.body.endswith(b"\n\n: end completed\n")
    assert server.session("c").snapshot().reason == ""
    assert (upstream.exchanges[0].method, upstream.exchanges[0].target) == ("POST", route)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_clean_end_without_the_terminator_is_completed_as_unterminated(
    server: Server, upstream: FakeUpstream, route: str
) -> None:
    upstream.play(stream(token("message_stop")))
    posted = await server.fetch("POST", route, {"X-Conversation-Id": "c"}, json={"stream": True})
    assert posted.body.endswith(b"\n\n: end completed\n")
    now = server.session("c").snapshot()
    assert (now.state, now.reason) == ("completed", "unterminated")


async def test_the_body_reaches_the_upstream_unchanged(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    body = b'{ "stream" :true, "unknown": [1.0, "\xc3\xbc \\u00fc"], "stream": true, "n":1e2 }'
    await server.fetch("POST", "/v1/completions", {"X-Conversation-Id": "c"}, body)
    assert upstream.exchanges[0].body == body


async def test_a_large_body_reaches_the_upstream_whole(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    body = orjson.dumps({"stream": True, "prompt": "picture " * 400_000})
    await server.fetch("POST", "/v1/completions", {"X-Conversation-Id": "c"}, body)
    assert upstream.exchanges[0].body == body


async def test_a_client_that_asks_whether_to_send_its_body_is_told_to(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    headers = {"X-Conversation-Id": "c", "Expect": "100-continue"}
    body = b'{"stream": true}'
    connection = await server.connect()
    raw = request_bytes("POST", "/v1/completions", headers, body)
    await connection.send(raw.removesuffix(body))
    while b"\r\n\r\n" not in connection.buffer:
        assert await connection.fill()
    assert connection.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    await connection.send(body)
    posted = await (await connection.response("POST")).whole()
    assert texts_of(posted.body) == ["[DONE]"]


@pytest.mark.parametrize(
    ("suffix", "target"),
    [
        ("/", "/v1/completions"),
        ("/v1", "/v1/completions"),
        ("/v1/", "/v1/completions"),
        ("/some/base", "/some/base/v1/completions"),
        ("/some/v1", "/some/v1/completions"),
    ],
)
async def test_the_upstreams_url_may_have_a_path_with_or_without_v1(
    serve: Serve, upstream: FakeUpstream, suffix: str, target: str
) -> None:
    server = await serve(upstream=upstream.url + suffix)
    upstream.play(stream(DONE))
    headers = {"X-Conversation-Id": "c"}
    await server.fetch("POST", "/v1/completions", headers, json={"stream": True})
    assert upstream.exchanges[0].target == target


async def test_the_response_headers_name_the_stream(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    posted = await (await server.post("c::m")).whole()
    assert {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
        "x-conversation-id": "c::m",
        "x-stream-epoch": server.session("c::m").epoch,
        "x-stream-offset": "0",
    }.items() <= posted.headers.items()
    assert {event.epoch for event in events_of(posted.body)} == {posted.headers["x-stream-epoch"]}


async def test_a_client_that_leaves_changes_nothing(server: Server, upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), LAST_CHUNK))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    posted.connection.reset()
    await until(lambda: server.session("c").snapshot().readers == 0)
    go_on.set()
    response = await server.fetch("GET", "/v1/stream/c")
    assert texts_of(response.body) == ["a", "b", "[DONE]"]
    assert response.body.startswith(posted.body)


async def test_a_client_that_leaves_before_the_status_changes_nothing(
    server: Server, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((go_on, *stream(token("a"), DONE)))
    connection = await server.connect()
    await connection.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Conversation-Id: c\r\n"
        b'Content-Length: 15\r\n\r\n{"stream":true}'
    )
    await upstream.exchange()
    connection.reset()
    go_on.set()
    await until(lambda: not server.session("c").is_live)
    response = await server.fetch("GET", "/v1/stream/c")
    assert texts_of(response.body) == ["a", "[DONE]"]


async def test_the_id_may_come_in_the_query_and_be_raw_utf8_in_the_header(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    target = "/v1/completions"
    for name, pairs, query in (
        ("grüße", [("X-Conversation-Id", "grüße".encode())], ""),
        ("q/ü", [], "?conv_id=q%2F%C3%BC"),
        ("q2", [("X-Conversation-Id", "")], "?conv_id=q2"),
        ("both", [("X-Conversation-Id", "both")], "?conv_id=both"),
    ):
        posted = await server.fetch("POST", target + query, pairs, json={"stream": True})
        assert posted.status == 200
        assert posted.headers["x-stream-epoch"] == server.session(name).epoch
    assert {exchange.target for exchange in upstream.exchanges} == {target}


async def test_two_different_ids_are_refused(server: Server) -> None:
    posted = await server.fetch(
        "POST", "/v1/completions?conv_id=a", {"X-Conversation-Id": "b"}, json={"stream": True}
    )
    assert (posted.status, posted.error["reason"]) == (400, "invalid_conversation_id")


async def test_a_session_is_queued_until_the_upstream_has_answered(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    posting = asyncio.create_task(server.post("c"))
    await upstream.exchange()
    assert server.session("c").state == "queued"
    server.session("c").cancel()
    assert (await posting).status == 400


async def test_the_status_is_held_back_until_the_upstream_has_answered(
    server: Server, upstream: FakeUpstream
) -> None:
    answers = asyncio.Event()
    upstream.play((answers, SSE_HEAD, STALL))
    posting = asyncio.create_task(server.post("c"))
    await upstream.exchange()
    await asyncio.sleep(0.05)
    assert not posting.done()
    answers.set()
    assert (await posting).status == 200
    assert server.session("c").state == "streaming"


async def test_the_status_is_held_back_no_longer_than_its_grace(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(status_grace_s=0.1, heartbeat_interval_s=0.02)
    answers = asyncio.Event()
    upstream.play((answers, answer(429, {"error": {"message": "later"}}, Retry_After="3")))
    posted = await server.post("c")
    assert posted.status == 200
    assert server.session("c").state == "queued"
    await posted.read_until(b": ping\n: ping\n")
    answers.set()
    await posted.read_to_end()
    (event,) = events_of(posted.body)
    assert orjson.loads(event.data) == {
        "error": {
            "code": 429,
            "type": "rate_limit_error",
            "message": "later",
            "reason": "upstream_error",
        }
    }
    assert posted.body.endswith(b"\n\n: end failed upstream_error\n")
    assert posted.end == "clean"
    assert server.session("c").state == "failed"


async def test_silence_is_filled_with_heartbeats_between_events(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(heartbeat_interval_s=0.02)
    go_on = asyncio.Event()
    half = token("b")[:9]
    upstream.play((SSE_HEAD, chunk(token("a") + half), go_on, chunk(token("b")[9:]), LAST_CHUNK))
    posted = await server.post("c")
    await posted.read_until(b"\n\n: ping\n: ping\n")
    go_on.set()
    await posted.read_to_end()
    assert texts_of(posted.body) == ["a", "b"]
    assert b": ping\n\n" not in posted.body


async def test_upstream_events_keep_their_form_and_lose_ids_retries_and_comments(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(
        stream(
            b"\xef\xbb\xbf:\n\n",
            b"id: 7\nretry:5\nevent:  x \ndata:a\r\ndata:  b\r\rid\n",
            b": note\ndata: c\n\nevent: nothing\n\nid: 9\n\n",
            "data: \u2028 \x85 \x00".encode() + b"\n\n",
        )
    )
    posted = await server.post("c")
    epoch = posted.headers["x-stream-epoch"]
    log = await posted.read_to_end()
    lines = [line for line in log.split(b"\n") if not line.startswith(b"id: " + epoch.encode())]
    assert lines == [
        *(b"event:  x ", b"data:a", b"data:  b", b"retry: 1000", b""),
        *(b": note", b"data: c", b""),
        *("data: \u2028 \x85 \x00".encode(), b""),
        *(b": end completed", b""),
    ]


async def test_bytes_that_are_not_utf8_pass_unchanged(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(b"data: \xff\xfe\xc3(\n\n", DONE))
    posted = await server.post("c")
    assert (await posted.read_to_end()).startswith(b"data: \xff\xfe\xc3(\nretry: 1000\nid: ")


@pytest.mark.parametrize(
    ("last", "texts"),
    [
        (token("b")[:-1], ["a", "b"]),  # lacks only the blank line
        (token("b")[:-2], ["a"]),  # its last line may lack something, too
        (b"event: b\n", ["a"]),
    ],
)
async def test_a_pending_event_is_published_if_its_last_line_is_complete(
    server: Server, upstream: FakeUpstream, last: bytes, texts: list[str]
) -> None:
    upstream.play((SSE_HEAD_UNTIL_CLOSE, token("a"), last))
    posted = await server.post("c")
    assert texts_of(await posted.read_to_end()) == texts
    assert posted.body.endswith(b"\n\n: end completed\n")


async def test_events_split_at_every_byte_arrive_whole(
    server: Server, upstream: FakeUpstream
) -> None:
    sent = token("a") + token("ü") + DONE
    upstream.play(stream(*(sent[at : at + 1] for at in range(len(sent)))))
    posted = await server.post("c")
    assert texts_of(await posted.read_to_end()) == ["a", "ü", "[DONE]"]


async def test_an_answer_split_at_every_byte_arrives_whole(
    server: Server, upstream: FakeUpstream
) -> None:
    sent = b"".join(stream(token("a") + b"id: 1\r\n\r\n", token("b"), DONE))
    upstream.play(tuple(sent[at : at + 1] for at in range(len(sent))))
    posted = await server.post("c")
    assert texts_of(await posted.read_to_end()) == ["a", "b", "[DONE]"]


async def test_the_log_drops_whole_events_from_its_front(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(max_session_bytes=4096)
    upstream.play(stream(*(token(str(n)) for n in range(300)), DONE))
    await (await server.post("c")).whole()
    assert server.session("c").dropped_prefix > 0
    response = await server.fetch("GET", "/v1/stream/c?from=earliest")
    texts = texts_of(response.body, server.session("c").dropped_prefix)
    assert texts == [*(str(n) for n in range(301 - len(texts), 300)), "[DONE]"]
    assert len(response.body) <= 4096


async def test_every_answer_has_a_request_id_the_callers_own_if_it_is_sane(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    mine = {"X-Request-Id": "a.B_9-z"}
    for method, target in (("GET", "/health"), ("GET", "/nowhere"), ("DELETE", "/v1/stream/c")):
        assert (await server.fetch(method, target, mine)).headers["x-request-id"] == "a.B_9-z"
    posted = await server.fetch("POST", "/v1/completions", mine, json={"stream": True})
    assert posted.headers["x-request-id"] == "a.B_9-z"
    bad = {"X-Request-Id": "a b"}
    given = [(await server.fetch("GET", "/health", bad)).headers["x-request-id"] for _ in range(2)]
    assert given[0] != given[1]
    assert "a b" not in given


async def test_a_full_memory_budget_is_told_with_retry_after(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(max_total_bytes=65536, max_session_bytes=4096)
    upstream.play((SSE_HEAD, STALL))
    with suppress(pyserve.MemoryBudgetError):
        while True:
            server.manager.create_or_replace(f"filler {len(server.manager)}")
    posted = await server.fetch(
        "POST", "/v1/completions", {"X-Conversation-Id": "c"}, json={"stream": True}
    )
    assert (posted.status, posted.error["reason"]) == (503, "memory_budget")
    assert posted.error["type"] == "overloaded_error"
    assert posted.headers["retry-after"] == "1"
    assert not upstream.exchanges
