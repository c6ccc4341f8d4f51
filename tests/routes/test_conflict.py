"""A POST for a conversation that already has a stream: replace, reject, attach, or a repeat."""

import asyncio

import pytest
from fake_upstream import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STALL,
    FakeUpstream,
    answer,
    chunk,
    stream,
    token,
)
from serving import Response, Serve, Server, texts_of, until

CHAT = "/v1/chat/completions"
BODY = b'{"stream": true}'


async def post(
    server: Server, key: str, body: bytes = BODY, target: str = CHAT, name: str = "c"
) -> Response:
    headers = {"X-Conversation-Id": name, "Idempotency-Key": key}
    return await server.open("POST", target, headers, body)


# --- X-Stream-Conflict


@pytest.mark.parametrize("mode", [{}, {"X_Stream_Conflict": "replace"}], ids=["default", "named"])
async def test_replace_cancels_the_live_generation_and_starts_anew(
    server: Server, upstream: FakeUpstream, mode: dict[str, str]
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL), stream(token("b"), DONE))
    first = await server.post("c")
    await first.read_until(b"\n\n")
    second = await (await server.post("c", **mode)).whole()
    assert texts_of(await first.read_to_end()) == ["a"]
    assert first.body.endswith(b"\n\n: end cancelled\n")
    assert first.end == "clean"
    await (await upstream.exchange(0)).wait_closed()
    assert texts_of(second.body) == ["b", "[DONE]"]
    assert second.headers["x-stream-epoch"] > first.headers["x-stream-epoch"]
    assert (await server.fetch("GET", "/v1/stream/c")).body == second.body


async def test_a_post_that_is_replaced_while_held_back_answers_409(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,), stream(DONE))
    posting = asyncio.create_task(server.post("c"))
    first = await upstream.exchange(0)
    second = await (await server.post("c")).whole()
    replaced = await (await posting).whole()
    assert replaced.status == 409
    assert replaced.error == {
        "code": 409,
        "type": "conflict_error",
        "message": "The generation was replaced by a newer one before it began",
        "reason": "replaced",
    }
    await first.wait_closed()
    assert texts_of(second.body) == ["[DONE]"]


async def test_reject_leaves_the_live_one_alone(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    first = await server.post("c")
    second = await (await server.post("c", X_Stream_Conflict="reject")).whole()
    assert second.status == 409
    assert second.error == {
        "epoch": first.headers["x-stream-epoch"],
        "code": 409,
        "type": "conflict_error",
        "message": "The conversation has a live stream",
        "reason": "session_active",
    }
    assert server.session("c").is_live
    assert len(upstream.exchanges) == 1


async def test_reject_also_counts_a_generation_that_is_still_queued(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    posting = asyncio.create_task(server.post("c"))
    await upstream.exchange()
    assert (await server.post("c", X_Stream_Conflict="reject")).status == 409
    await server.fetch("DELETE", "/v1/stream/c")
    assert (await posting).status == 400


@pytest.mark.parametrize("mode", ["replace", "reject", "attach"])
async def test_a_stream_that_is_over_is_no_conflict(
    server: Server, upstream: FakeUpstream, mode: str
) -> None:
    upstream.play(stream(token("a"), DONE), stream(token("b"), DONE))
    await (await server.post("c")).whole()
    second = await (await server.post("c", X_Stream_Conflict=mode)).whole()
    assert texts_of(second.body) == ["b", "[DONE]"]


async def test_attach_starts_nothing_and_reads_the_live_one(
    server: Server, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), LAST_CHUNK))
    first = await server.post("c")
    await first.read_until(b"\n\n")
    second = await server.post("c", X_Stream_Conflict="attach")
    assert second.headers["x-stream-epoch"] == first.headers["x-stream-epoch"]
    go_on.set()
    assert texts_of(await second.read_to_end()) == ["a", "b", "[DONE]"]
    assert await first.read_to_end() == second.body
    assert len(upstream.exchanges) == 1


async def test_attach_reads_from_the_first_offset_even_where_the_start_is_lost(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(max_session_bytes=4096)
    words = b"".join(token(str(n)) for n in range(200))
    upstream.play((SSE_HEAD, chunk(words), STALL))
    await server.post("c")
    await until(lambda: server.session("c").dropped_prefix > 0)
    attached = await server.post("c", X_Stream_Conflict="attach")
    assert attached.status == 200
    assert attached.headers["x-stream-offset"] == str(server.session("c").dropped_prefix)


async def test_an_unknown_mode_is_refused(server: Server) -> None:
    response = await (await server.post("c", X_Stream_Conflict="ignore")).whole()
    assert (response.status, response.error["reason"]) == (400, "invalid_parameter")


# --- Idempotency-Key


async def test_a_repeat_attaches_to_the_session_its_key_created(
    server: Server, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), LAST_CHUNK))
    first = await post(server, "k")
    await first.read_until(b"\n\n")
    repeat = await post(server, "k")
    assert repeat.headers["x-stream-epoch"] == first.headers["x-stream-epoch"]
    go_on.set()
    assert texts_of(await repeat.read_to_end()) == ["a", "b", "[DONE]"]
    assert await first.read_to_end() == repeat.body
    assert len(upstream.exchanges) == 1


async def test_a_repeat_replays_a_session_that_is_over(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(token("a"), DONE))
    first = await (await post(server, "k")).whole()
    repeat = await (await post(server, "k")).whole()
    assert repeat.body == first.body
    assert repeat.headers["x-stream-epoch"] == first.headers["x-stream-epoch"]
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("live", [True, False], ids=["live", "over"])
async def test_the_same_key_with_another_body_is_422(
    server: Server, upstream: FakeUpstream, live: bool
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL) if live else stream(DONE))
    first = await post(server, "k")
    await first.read_until(b"\n\n")
    for other in (b'{"stream":true}', b'{"stream": true} ', b'{"stream": true, "n": 1}'):
        response = await (await post(server, "k", other)).whole()
        assert response.status == 422
        assert response.error == {
            "code": 422,
            "type": "invalid_request_error",
            "message": "This Idempotency-Key was used with another request body",
            "reason": "idempotency_mismatch",
        }
    assert server.session("c").epoch == first.headers["x-stream-epoch"]
    assert len(upstream.exchanges) == 1


async def test_a_keys_scope_is_route_and_conversation(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    answers = [
        await (await post(server, "k")).whole(),
        await (await post(server, "k", name="d")).whole(),
        await (await post(server, "k2")).whole(),
        await (await post(server, "k", target="/v1/completions")).whole(),
        await (await post(server, "K", target="/v1/completions")).whole(),
    ]
    assert {response.status for response in answers} == {200}
    assert len({response.headers["x-stream-epoch"] for response in answers}) == 5
    assert len(upstream.exchanges) == 5


@pytest.mark.parametrize("mode", ["replace", "reject", "attach"])
async def test_a_repeat_is_no_conflict(server: Server, upstream: FakeUpstream, mode: str) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    first = await server.post("c", Idempotency_Key="k")
    repeat = await server.post("c", Idempotency_Key="k", X_Stream_Conflict=mode)
    assert repeat.status == 200
    assert repeat.headers["x-stream-epoch"] == first.headers["x-stream-epoch"]


async def test_another_key_is_a_conflict_like_any_other(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    await server.post("c", Idempotency_Key="k")
    assert (await server.post("c", Idempotency_Key="l", X_Stream_Conflict="reject")).status == 409
    second = await server.post("c", Idempotency_Key="l")
    assert second.headers["x-stream-epoch"] == server.session("c").epoch
    assert len(upstream.exchanges) == 2


async def test_a_keys_life_is_that_of_the_log(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    first = await (await post(server, "k")).whole()
    await server.fetch("DELETE", "/v1/stream/c")
    second = await (await post(server, "k", b'{"stream": true, "n": 2}')).whole()
    assert second.status == 200
    assert second.headers["x-stream-epoch"] != first.headers["x-stream-epoch"]


async def test_a_repeat_while_the_first_is_starting_waits_for_it(
    server: Server, upstream: FakeUpstream
) -> None:
    begins = asyncio.Event()
    upstream.play((begins, *stream(token("a"), DONE)))
    first = asyncio.create_task(post(server, "k"))
    await upstream.exchange()
    repeat = asyncio.create_task(post(server, "k"))
    await asyncio.sleep(0.05)
    assert not repeat.done()
    begins.set()
    bodies = [await (await task).read_to_end() for task in (first, repeat)]
    assert bodies[0] == bodies[1]
    assert texts_of(bodies[0]) == ["a", "[DONE]"]
    assert len(upstream.exchanges) == 1


async def test_a_start_that_failed_is_shared_by_its_repeat_and_frees_its_key(
    server: Server, upstream: FakeUpstream
) -> None:
    fails = asyncio.Event()
    upstream.play((fails, answer(500, {"error": {"message": "broken"}})), stream(token("a"), DONE))
    first = asyncio.create_task(post(server, "k"))
    await upstream.exchange()
    repeat = asyncio.create_task(post(server, "k"))
    mismatch = await (await post(server, "k", b'{"stream": true, "n": 2}')).whole()
    assert mismatch.status == 422
    fails.set()
    for task in (first, repeat):
        response = await (await task).whole()
        assert (response.status, response.error["message"]) == (500, "broken")
    again = await (await post(server, "k", b'{"stream": true, "n": 2}')).whole()
    assert texts_of(again.body) == ["a", "[DONE]"]
    assert len(upstream.exchanges) == 2


async def test_a_repeat_of_a_start_that_is_stopped_is_told_so_too(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,), stream(DONE))
    first = asyncio.create_task(post(server, "k"))
    await upstream.exchange()
    repeat = asyncio.create_task(post(server, "k"))
    await asyncio.sleep(0.05)
    await server.fetch("DELETE", "/v1/stream/c")
    for task in (first, repeat):
        response = await (await task).whole()
        assert (response.status, response.error["reason"]) == (400, "cancelled")
    assert (await (await post(server, "k")).whole()).status == 200


async def test_a_repeats_status_is_held_back_no_longer_than_its_own_grace(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(status_grace_s=0.1)
    upstream.play((STALL,))
    first, repeat = await asyncio.gather(post(server, "k"), post(server, "k"))
    assert (first.status, repeat.status) == (200, 200)
    assert first.headers["x-stream-epoch"] == repeat.headers["x-stream-epoch"]


async def test_a_key_of_any_bytes_works_and_a_huge_one_is_refused(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    headers = [("X-Conversation-Id", "c"), ("Idempotency-Key", b"\xff \xc3\xbc")]
    epochs = {
        (await server.fetch("POST", CHAT, headers, BODY)).headers["x-stream-epoch"]
        for _ in range(2)
    }
    assert len(epochs) == 1
    response = await (await post(server, "k" * 256)).whole()
    assert (response.status, response.error["reason"]) == (400, "invalid_parameter")


async def test_without_a_conversation_id_a_key_means_nothing(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(DONE))
    for _ in range(2):
        await server.fetch("POST", CHAT, {"Idempotency-Key": "k"}, BODY)
    assert len(upstream.exchanges) == 2
    assert "idempotency-key" not in upstream.exchanges[0].headers
