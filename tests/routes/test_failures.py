"""What an upstream can do wrong, and what the client is told."""

import asyncio
import gzip
import socket

import orjson
import pytest
from fake_upstream import (
    DONE,
    LAST_CHUNK,
    RESET,
    SSE_HEAD,
    STALL,
    FakeUpstream,
    Step,
    answer,
    chunk,
    stream,
    token,
)
from serving import Response, Serve, Server, events_of, texts_of

pytestmark = pytest.mark.usefixtures("delivery_path")

WAYS = {"kept": {"X-Conversation-Id": "c"}, "strict proxy": {}}


async def ask(server: Server, headers: dict[str, str]) -> Response:
    return await server.fetch("POST", "/v1/chat/completions", headers, json={"stream": True})


# --- before it has begun: an answer of its own, and no session


EARLY: dict[str, tuple[tuple[Step, ...], int, str]] = {
    "closes without a byte": ((b"",), 502, "upstream_lost"),
    "resets without a byte": ((RESET,), 502, "upstream_lost"),
    "is not HTTP": ((b"SSH-2.0-OpenSSH_9.2\r\n\r\n",), 502, "upstream_invalid"),
    "status is no number": ((b"HTTP/1.1 two OK\r\n\r\n",), 502, "upstream_invalid"),
    "NUL in the head": ((b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",), 502, "upstream_invalid"),
    "bad length": ((b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",), 502, "upstream_invalid"),
    "endless head line": ((b"HTTP/1.1 200 " + b"x" * 100_000,), 502, "upstream_invalid"),
    "endless head": (
        (b"HTTP/1.1 200 OK\r\n" + b"X-More: and more\r\n" * 50_000,),
        502,
        "upstream_invalid",
    ),
    "redirect": ((answer(302, Location="http://127.0.0.1:1/"),), 502, "upstream_invalid"),
    "not modified": ((b"HTTP/1.1 304 Not Modified\r\n\r\n",), 502, "upstream_invalid"),
    "gzip": (
        (answer(200, gzip.compress(DONE), kind="text/event-stream", Content_Encoding="gzip"),),
        502,
        "upstream_invalid",
    ),
    "refuses our key": ((answer(401, {"error": {"message": "secret"}}),), 502, "upstream_auth"),
    "forbids": ((answer(403, {"error": {"message": "secret"}}),), 502, "upstream_auth"),
    "an error page": ((answer(500, b"<h1>secret</h1>", kind="text/html"),), 500, "upstream_error"),
    "an empty error": ((answer(503),), 503, "upstream_error"),
    "a broken error": ((answer(500, b'{"error"', kind="application/json"),), 500, "upstream_error"),
    "an error of odd form": ((answer(500, {"error": ["secret"]}),), 500, "upstream_error"),
    "an error cut short": (
        (b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\n{", RESET),
        500,
        "upstream_error",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", EARLY)
async def test_an_early_failure_has_its_own_status_and_leaves_no_session(
    server: Server, upstream: FakeUpstream, case: str, way: str
) -> None:
    script, status, reason = EARLY[case]
    upstream.play(script)
    response = await ask(server, WAYS[way])
    assert (response.status, response.error["reason"]) == (status, reason)
    assert response.error["code"] == status
    assert response.headers["content-type"] == "application/json"
    assert response.end == "clean"
    for secret in (b"secret", b"html", b"Error(", b"127.0.0.1", b"OpenSSH"):
        assert secret not in response.body
    assert len(server.manager) == 0
    assert (await server.fetch("GET", "/v1/stream/c")).status == 404


@pytest.mark.parametrize("way", WAYS)
async def test_a_refused_connection_is_502(serve: Serve, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    server = await serve(upstream=f"http://127.0.0.1:{port}")
    response = await ask(server, WAYS[way])
    assert response.status == 502
    assert response.error == {
        "code": 502,
        "type": "upstream_error",
        "message": "The upstream cannot be reached",
        "reason": "upstream_unreachable",
    }
    assert len(server.manager) == 0


async def test_a_200_that_is_no_event_stream_fails(server: Server, upstream: FakeUpstream) -> None:
    for kind in ("text/html", "application/json", "text/event-streams", ""):
        upstream.play(answer(200, b"data: [DONE]\n\n", kind=kind))
        response = await ask(server, WAYS["kept"])
        assert (response.status, response.error["reason"]) == (502, "upstream_not_sse")
        assert len(server.manager) == 0


async def test_parameters_and_case_of_the_content_type_do_not_matter(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(answer(200, DONE, kind="Text/Event-Stream;charset=UTF-8"))
    assert texts_of((await ask(server, WAYS["kept"])).body) == ["[DONE]"]


async def test_an_upstreams_own_error_keeps_status_message_and_kind(
    server: Server, upstream: FakeUpstream
) -> None:
    told = {"message": "no such model", "type": "not_found", "code": 17, "param": None, "x": "y"}
    for way in WAYS.values():
        upstream.play(answer(404, {"error": told}))
        response = await ask(server, way)
        assert response.status == 404
        assert response.error == {
            "upstream_type": "not_found",
            "upstream_code": 17,
            "code": 404,
            "type": "not_found_error",
            "message": "no such model",
            "reason": "upstream_error",
        }


async def test_an_error_told_as_a_string_is_passed_on_but_not_endlessly(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(answer(400, {"error": "too " * 5000 + "long"}))
    response = await ask(server, WAYS["kept"])
    assert response.status == 400
    assert response.error["message"].startswith("too too")
    assert len(response.body) < 4096


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("7", "7"),
        ("0", "0"),
        ("86400", "86400"),
        ("86401", None),
        ("-1", None),
        ("1.5", None),
        ("9" * 400, None),
        ("Wed, 21 Oct 2037 07:28:00 GMT", None),
        ("\u0663", None),
        ("", None),
    ],
)
async def test_retry_after_is_passed_on_if_it_is_sane(
    server: Server, upstream: FakeUpstream, given: str, passed_on: str | None, way: str
) -> None:
    upstream.play(answer(429, {"error": {"message": "slow down"}}, Retry_After=given))
    response = await ask(server, WAYS[way])
    assert (response.status, response.error["type"]) == (429, "rate_limit_error")
    assert response.headers.get("retry-after") == passed_on


async def test_a_loading_model_is_503_with_retry_after(
    server: Server, upstream: FakeUpstream
) -> None:
    told = {"message": "Loading model", "type": "unavailable_error", "code": 503}
    for way in WAYS.values():
        upstream.play(answer(503, {"error": told}))
        response = await ask(server, way)
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
        assert response.error == {
            "code": 503,
            "type": "overloaded_error",
            "message": "The model is loading, try again soon",
            "reason": "model_loading",
        }


async def test_a_context_overflow_keeps_its_token_counts(
    server: Server, upstream: FakeUpstream
) -> None:
    message = "the request exceeds the available context size"
    told = {
        "code": 400,
        "message": message,
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 900,
        "n_ctx": 512,
    }
    for way in WAYS.values():
        upstream.play(answer(400, {"error": told}))
        response = await ask(server, way)
        assert response.status == 400
        assert response.error == {
            "n_prompt_tokens": 900,
            "n_ctx": 512,
            "code": 400,
            "type": "invalid_request_error",
            "message": message,
            "reason": "context_overflow",
        }


async def test_an_error_whose_body_never_ends_is_told_all_the_same(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\n{", STALL))
    response = await ask(server, WAYS["kept"])
    assert (response.status, response.error["reason"]) == (500, "upstream_error")
    await (await upstream.exchange()).wait_closed()


async def test_a_silent_upstream_within_the_grace_is_504(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(upstream_first_byte_timeout_s=0.05)
    upstream.play((STALL,))
    for way in WAYS.values():
        response = await ask(server, way)
        assert (response.status, response.error["reason"]) == (504, "upstream_timeout")
    assert len(server.manager) == 0
    await (await upstream.exchange()).wait_closed()


async def test_who_attached_meanwhile_gets_the_error_event_and_the_end(
    server: Server, upstream: FakeUpstream
) -> None:
    fails = asyncio.Event()
    upstream.play((fails, answer(500, {"error": {"message": "broken"}})))
    posting = asyncio.create_task(server.post("c"))
    await upstream.exchange()
    attached = await server.open("GET", "/v1/stream/c")
    fails.set()
    assert (await posting).status == 500
    assert texts_of(await attached.read_to_end()) == ["upstream_error"]
    assert attached.body.endswith(b"\n\n: end failed upstream_error\n")
    assert attached.end == "clean"
    assert len(server.manager) == 0


# --- after it has begun: an error event, nothing behind it but the end


HALF = token("b")[:-5]

LATE: dict[str, tuple[tuple[Step, ...], str]] = {
    "closes between events": ((SSE_HEAD, chunk(token("a"))), "upstream_lost"),
    "closes mid-event": ((SSE_HEAD, chunk(token("a") + HALF)), "upstream_lost"),
    "closes mid-chunk": ((SSE_HEAD, chunk(token("a")), b"40\r\ndata: b"), "upstream_lost"),
    "resets mid-event": ((SSE_HEAD, chunk(token("a") + HALF), "taken", RESET), "upstream_lost"),
    "stalls between events": ((SSE_HEAD, chunk(token("a")), STALL), "upstream_timeout"),
    "stalls mid-event": ((SSE_HEAD, chunk(token("a") + HALF), STALL), "upstream_timeout"),
    "breaks off before its length": (
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n",
            token("a") + HALF,
        ),
        "upstream_lost",
    ),
    "an event too large": (
        (SSE_HEAD, chunk(token("a")), chunk(b"data: " + b"x" * 5000), STALL),
        "event_too_large",
    ),
    "a whole event too large": (
        (SSE_HEAD, chunk(token("a")), chunk(token("x" * 5000)), STALL),
        "event_too_large",
    ),
}


@pytest.mark.parametrize("case", LATE)
async def test_a_late_failure_is_an_error_event_and_the_end(
    serve: Serve, upstream: FakeUpstream, case: str
) -> None:
    script, reason = LATE[case]
    server = await serve(
        upstream_idle_timeout_s=0.2 if reason == "upstream_timeout" else 30.0,
        max_session_bytes=4096,
    )
    taken = asyncio.Event()
    upstream.play(tuple(taken if step == "taken" else step for step in script))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    taken.set()
    await posted.read_to_end()
    assert posted.status == 200
    assert texts_of(posted.body) == ["a", reason]
    assert posted.body.endswith(f"\n\n: end failed {reason}\n".encode())
    assert posted.end == "clean"
    error = orjson.loads(events_of(posted.body)[-1].data)["error"]
    assert list(error) == ["code", "type", "message", "reason"]
    now = server.session("c").snapshot()
    assert (now.state, now.reason) == ("failed", reason)
    assert (await server.fetch("GET", "/v1/stream/c")).body == posted.body
    await (await upstream.exchange()).wait_closed()


async def test_a_bad_chunk_size_in_mid_stream_ends_it_too(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(upstream_idle_timeout_s=0.2)
    taken = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), taken, b"zz\r\ndata: b\n\n\r\n", STALL))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    taken.set()
    await posted.read_to_end()
    first, reason = texts_of(posted.body)
    assert first == "a"
    assert reason in ("upstream_lost", "upstream_timeout")  # aiohttp's client doesn't always wake


async def test_no_first_byte_in_time_is_told_in_the_stream(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(upstream_first_byte_timeout_s=0.1, upstream_idle_timeout_s=30.0)
    upstream.play((SSE_HEAD, STALL))
    posted = await server.post("c")
    assert texts_of(await posted.read_to_end()) == ["upstream_timeout"]


async def test_the_first_byte_may_take_longer_than_later_ones(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(upstream_first_byte_timeout_s=30.0, upstream_idle_timeout_s=0.3)
    prompt_read = asyncio.Event()
    upstream.play((SSE_HEAD, prompt_read, chunk(token("a") + DONE), LAST_CHUNK))
    posted = await server.post("c")
    await asyncio.sleep(0.4)
    prompt_read.set()
    assert texts_of(await posted.read_to_end()) == ["a", "[DONE]"]


async def test_on_messages_an_error_is_a_named_event(serve: Serve, upstream: FakeUpstream) -> None:
    server = await serve()
    upstream.play((SSE_HEAD, chunk(b'event: ping\ndata: {"type": "ping"}\n\n')))
    posted = await server.fetch(
        "POST", "/v1/messages", {"X-Conversation-Id": "c"}, json={"stream": True}
    )
    event = events_of(posted.body)[-1]
    assert event.name == "error"
    assert orjson.loads(event.data) == {
        "type": "error",
        "error": {
            "code": 502,
            "type": "upstream_error",
            "message": "The connection to the upstream was lost",
            "reason": "upstream_lost",
        },
    }


async def test_an_events_of_the_upstreams_own_error_is_passed_like_any_other(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(token("a"), b'data: {"error": {"reason": "its own"}}\n\n'))
    posted = await server.post("c")
    assert texts_of(await posted.read_to_end()) == ["a", "its own"]
    assert server.session("c").snapshot().reason == "unterminated"


# --- behind the strict proxy nothing can be told: the connection is reset


@pytest.mark.parametrize("case", ["closes mid-chunk", "resets mid-event", "stalls mid-event"])
async def test_the_strict_proxy_resets_an_answer_that_broke_off(
    serve: Serve, upstream: FakeUpstream, case: str
) -> None:
    server = await serve(upstream_idle_timeout_s=0.2)
    taken = asyncio.Event()
    script = LATE[case][0]
    upstream.play(tuple(taken if step == "taken" else step for step in script))
    for version in ("1.1", "1.0"):
        response = await server.open(
            "POST", "/v1/completions", json={"stream": True}, version=version
        )
        await response.read_until(token("a"))
        taken.set()
        await response.read_to_end()
        assert response.end == "reset"
        assert b"HTTP/1." not in response.body
