"""GET /v1/stream: where a reader may begin, and what it is told otherwise."""

import asyncio

import pytest
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from serving import Serve, Server, events_of, texts_of

import pyserve

pytestmark = pytest.mark.usefixtures("delivery_path")


def finished(server: Server, *texts: str, conversation_id: str = "c") -> pyserve.StreamSession:
    """A session that is over, with these events."""
    session = server.manager.create_or_replace(conversation_id)
    for text in texts:
        session.append(token(text))
    session.finalize()
    return session


def whole_log(session: pyserve.StreamSession) -> bytes:
    reader = session.read_from("earliest")
    log = b""
    while block := reader.read_ready():
        log += block
    reader.close()
    return log


async def test_a_finished_stream_is_read_whole_and_ends_cleanly(server: Server) -> None:
    session = finished(server, "a", "b")
    response = await server.fetch("GET", "/v1/stream/c")
    assert response.status == 200
    assert response.end == "clean"
    assert response.body == whole_log(session)
    assert texts_of(response.body) == ["a", "b"]
    assert response.body.endswith(b"\n\n: end completed\n")


async def test_the_headers_tell_what_is_read(server: Server) -> None:
    session = finished(server, "a", conversation_id="grüße::m/1")
    response = await server.fetch("GET", "/v1/stream/gr%C3%BC%C3%9Fe::m/1?from=7")
    assert {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
        "x-conversation-id": "gr%C3%BC%C3%9Fe::m/1",
        "x-stream-epoch": session.epoch,
        "x-stream-offset": "7",
    }.items() <= response.headers.items()
    assert response.body == whole_log(session)[7:]


async def test_a_live_stream_replays_then_follows_to_its_end(
    server: Server, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), chunk(b"")))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    reading = await server.open("GET", "/v1/stream/c")
    assert texts_of(await reading.read_until(b"\n\n")) == ["a"]
    go_on.set()
    assert texts_of(await reading.read_to_end()) == ["a", "b", "[DONE]"]
    assert await posted.read_to_end() == reading.body
    assert posted.end == reading.end == "clean"


async def test_every_position_of_a_log_gives_its_rest(server: Server) -> None:
    session = finished(server, "a", "b")
    log = whole_log(session)
    for offset in range(0, len(log) + 1, 5):
        for position in (str(offset), f"{session.epoch}-{offset}", f"000{offset}"):
            response = await server.fetch("GET", f"/v1/stream/c?from={position}")
            assert (response.status, response.body) == (200, log[offset:]), position
            assert response.end == "clean"
            assert response.headers["x-stream-offset"] == str(offset)


async def test_an_event_id_continues_behind_its_event(server: Server) -> None:
    session = finished(server, "a", "b", "c")
    for event in events_of(whole_log(session))[:2]:
        last = {"Last-Event-ID": f"{event.epoch}-{event.end}"}
        response = await server.fetch("GET", "/v1/stream/c", last)
        assert response.body == whole_log(session)[event.end :]


async def test_the_end_offset_is_a_position_of_a_finished_stream(server: Server) -> None:
    session = finished(server, "a")
    response = await server.fetch("GET", f"/v1/stream/c?from={session.total_size}")
    assert (response.status, response.body, response.end) == (200, b"", "clean")


async def test_last_event_id_wins_over_from_even_over_a_bad_one(server: Server) -> None:
    session = finished(server, "a", "b")
    first = events_of(whole_log(session))[0].end
    for query in ("from=0", "from=earliest", "from=nonsense", "from=999999"):
        response = await server.fetch(
            "GET", f"/v1/stream/c?{query}", {"Last-Event-ID": f"{session.epoch}-{first}"}
        )
        assert (response.status, response.headers["x-stream-offset"]) == (200, str(first))


async def test_an_empty_last_event_id_counts_as_absent(server: Server) -> None:
    finished(server, "a")
    response = await server.fetch("GET", "/v1/stream/c?from=3", {"Last-Event-ID": ""})
    assert response.headers["x-stream-offset"] == "3"


async def test_the_id_is_taken_from_the_query_too(server: Server) -> None:
    session = finished(server, "a", conversation_id="a/b&c ü")
    for target in (
        "/v1/stream?conv_id=a%2Fb%26c+%C3%BC",
        "/v1/stream?conv_id=a/b%26c%20%C3%BC",
        "/v1/stream/a/b&c%20%C3%BC",
        "/v1/stream/a%2Fb&c%20%C3%BC",
    ):
        assert (await server.fetch("GET", target)).body == whole_log(session)


# --- 204: EventSource comes back after every clean 200, and after nothing else


async def test_204_for_last_event_id_where_no_event_follows(server: Server) -> None:
    session = finished(server, "a", "b")
    last_event = events_of(whole_log(session))[-1].end
    for offset in (last_event, last_event + 3, session.total_size):
        last = {"Last-Event-ID": f"{session.epoch}-{offset}"}
        response = await server.fetch("GET", "/v1/stream/c", last)
        assert (response.status, response.body) == (204, b"")
        assert "content-length" not in response.headers
    for target in (f"?from={last_event}", f"?from={session.epoch}-{last_event}"):
        response = await server.fetch("GET", "/v1/stream/c" + target)
        assert (response.status, response.body) == (200, b": end completed\n")


async def test_204_whatever_the_position_for_a_stream_that_ended_without_any_event(
    server: Server,
) -> None:
    session = finished(server)
    for target in ("", "?from=0", "?from=999", "?from=earliest", f"?from={session.epoch}-3"):
        assert (await server.fetch("GET", "/v1/stream/c" + target)).status == 204
    last = {"Last-Event-ID": f"{session.epoch}-0"}
    assert (await server.fetch("GET", "/v1/stream/c", last)).status == 204


async def test_no_204_while_the_stream_is_live(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await server.post("c")
    (event,) = events_of(await posted.read_until(b"\n\n"))
    last = {"Last-Event-ID": f"{event.epoch}-{event.end}"}
    reading = await server.open("GET", "/v1/stream/c", last)
    assert (reading.status, reading.end) == (200, None)
    server.session("c").finalize()
    assert await reading.read_to_end() == b": end completed\n"


# --- positions that cannot be read


async def test_a_position_that_was_dropped_is_told_as_lost(serve: Serve) -> None:
    server = await serve(max_session_bytes=4096)
    session = finished(server, *(f"word {n}" for n in range(100)))
    now = session.snapshot()
    assert now.first_offset > 0
    for position in ("0", str(now.first_offset - 1), f"{session.epoch}-1"):
        response = await server.fetch("GET", f"/v1/stream/c?from={position}")
        assert response.status == 400
        assert response.error == {
            "first_offset": now.first_offset,
            "end_offset": now.end_offset,
            "epoch": session.epoch,
            "code": 400,
            "type": "invalid_request_error",
            "message": "Stream offset lost, please restart",
            "reason": "offset_lost",
        }
    last = {"Last-Event-ID": f"{session.epoch}-1"}
    assert (await server.fetch("GET", "/v1/stream/c", last)).error["reason"] == "offset_lost"
    assert (await server.fetch("GET", "/v1/stream/c")).error["reason"] == "offset_lost"


async def test_earliest_begins_where_the_log_begins_now(serve: Serve) -> None:
    server = await serve(max_session_bytes=4096)
    session = finished(server, *(f"word {n}" for n in range(100)))
    response = await server.fetch("GET", "/v1/stream/c?from=earliest")
    assert response.status == 200
    assert response.headers["x-stream-offset"] == str(session.dropped_prefix)
    texts = texts_of(response.body, session.dropped_prefix)
    assert texts == [f"word {n}" for n in range(100 - len(texts), 100)]


@pytest.mark.parametrize("live", [True, False], ids=["live", "over"])
async def test_a_position_beyond_the_end_is_refused_not_waited_for(
    server: Server, live: bool
) -> None:
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    if not live:
        session.finalize()
    end = session.total_size
    for position in (str(end + 1), str(2**63 - 1), f"{session.epoch}-{end + 1}"):
        response = await server.fetch("GET", f"/v1/stream/c?from={position}")
        assert response.status == 400
        assert response.error == {
            "first_offset": 0,
            "end_offset": end,
            "epoch": session.epoch,
            "code": 400,
            "type": "invalid_request_error",
            "message": "The position is beyond the end of the stream",
            "reason": "offset_ahead",
        }
    last = {"Last-Event-ID": f"{session.epoch}-{end + 1}"}
    assert (await server.fetch("GET", "/v1/stream/c", last)).error["reason"] == "offset_ahead"
    session.finalize()


@pytest.mark.parametrize("events", [["b"], []], ids=["with events", "without any"])
async def test_another_epoch_is_told_with_the_current_one(
    server: Server, events: list[str]
) -> None:
    old = finished(server, "a").epoch
    session = finished(server, *events)
    for headers, target in (
        ({}, f"?from={old}-0"),
        ({"Last-Event-ID": f"{old}-0"}, ""),
        ({"Last-Event-ID": f"{old}-999999"}, "?from=0"),
        ({"Last-Event-ID": "zzzzzzzz-5"}, ""),
    ):
        response = await server.fetch("GET", "/v1/stream/c" + target, headers)
        assert response.status == 409
        assert response.error == {
            "epoch": session.epoch,
            "code": 409,
            "type": "conflict_error",
            "message": "The stream was replaced by a newer one",
            "reason": "stream_replaced",
        }


async def test_unknown_stopped_and_expired_streams_answer_alike(serve: Serve) -> None:
    server = await serve(session_ttl_s=0.0)
    finished(server, "a", conversation_id="expired")
    server.manager.create_or_replace("stopped")
    assert (await server.fetch("DELETE", "/v1/stream/stopped")).status == 204
    answers = {
        bytes((await server.fetch("GET", f"/v1/stream/{conversation_id}{query}")).body)
        for conversation_id in ("expired", "stopped", "unknown")
        for query in ("", "?from=5", "?from=zzz-5")
    }
    (only,) = answers
    response = await server.fetch("GET", "/v1/stream/unknown")
    assert (response.status, response.body) == (404, only)
    assert response.error == {
        "code": 404,
        "type": "not_found_error",
        "message": "Stream not found or expired",
        "reason": "stream_not_found",
    }


async def test_range_is_ignored(server: Server) -> None:
    session = finished(server, "a")
    response = await server.fetch("GET", "/v1/stream/c", {"Range": "bytes=2-5"})
    assert (response.status, response.body) == (200, whole_log(session))


async def test_a_finished_post_can_be_read_again(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    posted = await server.post("c")
    await posted.read_to_end()
    assert (await server.fetch("GET", "/v1/stream/c")).body == posted.body
