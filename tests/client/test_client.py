"""The client's promise: every event once, in order, to the end, whatever the connection does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from aiohttp import web
from cutting_proxy import Cut, CuttingProxy, cutting_proxy
from serving import Server, serving, until

import pyserve
from pyserve.client import (
    Client,
    Connection,
    EventStream,
    Gap,
    GoneError,
    OffsetLostError,
    ReplacedError,
    UnreachableError,
)

WORDS = ["Ein ", "Wörtchen ", "gibt ", "das\nnächste", " und 🙂 ", "ein Ende"]
TEXT = "".join(WORDS)


def written(server: Server, conversation_id: str = "chat") -> pyserve.StreamSession:
    """A stream that is over."""
    session = server.manager.create_or_replace(conversation_id)
    for word in WORDS:
        session.append_event(word)
    session.finalize()
    return session


async def text_of(stream: EventStream) -> str:
    return "".join([event.data async for event in stream])


async def log_of(session: pyserve.StreamSession, position: str | int = 0) -> bytes:
    return b"".join([block async for block in session.read_from(position)])


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_the_text_is_the_same_wherever_the_connection_is_cut(
    server: Server, proxy: CuttingProxy, client: Client, how: str
) -> None:
    log = await log_of(written(server))
    for after in range(0, len(log) + 40, 11):
        proxy.cuts.append(Cut(after, how))
        stream = client.attach("chat")
        assert await text_of(stream) == TEXT, f"cut after {after} bytes"
        assert (stream.state, stream.reason) == ("completed", None)
    assert not proxy.cuts


@pytest.mark.parametrize("inside", ["Wö".encode()[:-1], "🙂".encode()[:2], b"\nid: ", b"dat"])
async def test_a_cut_inside_a_character_or_a_field_costs_nothing(
    server: Server, proxy: CuttingProxy, client: Client, inside: bytes
) -> None:
    written(server)
    proxy.cuts += [Cut(inside), Cut(inside, "close")]
    assert await text_of(client.attach("chat")) == TEXT


async def test_a_live_stream_is_read_whole_over_connections_that_never_last(
    server: Server, proxy: CuttingProxy, client: Client
) -> None:
    chance = random.Random(7)
    proxy.cuts += [Cut(chance.randrange(1500), "reset") for _ in range(200)]
    words = [f"word {number} " for number in range(300)]
    session = server.manager.create_or_replace("chat")

    async def produce() -> None:
        with session:
            for number, word in enumerate(words):
                session.append_event(word)
                await asyncio.sleep(0.06 if number % 100 == 99 else 0.001)

    producing = asyncio.create_task(produce())
    stream = client.attach("chat")
    assert await text_of(stream) == "".join(words)
    await producing
    assert stream.state == "completed"
    assert len(proxy.requests) > 10
    # Until the first answer no epoch is known; from then on event ids are sent.
    plain = [position for position in proxy.positions if "-" not in position]
    assert proxy.positions[: len(plain)] == plain == ["0"] * len(plain)


async def test_the_logs_bytes_come_exactly_whatever_is_cut(
    server: Server, proxy: CuttingProxy, client: Client
) -> None:
    log = await log_of(written(server))
    for position in (0, 17):
        proxy.cuts += [Cut(1), Cut(100, "close"), Cut(30), Cut(140)]
        stream = client.read_log("chat", from_=position)
        assert b"".join([block async for block in stream]) == log[position:]
        assert stream.state == "completed"
        assert stream.offset == len(log)


async def test_silence_is_noticed_and_the_stream_goes_on(
    server: Server, proxy: CuttingProxy, make_client: Callable[..., Client]
) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event(WORDS[0])
    proxy.cuts.append(Cut(b"\n\n", "stall"))
    news: list[Connection] = []
    client = make_client(proxy.url, stall_timeout_s=0.2)
    stream = client.attach("chat", on_connection=news.append)
    assert (await anext(stream)).data == WORDS[0]
    for word in WORDS[1:]:
        session.append_event(word)
    session.finalize()
    assert await text_of(stream) == "".join(WORDS[1:])
    assert "no heartbeat for 0.2 s" in str(news[1].error)
    assert news[2] == Connection(news[1].offset)


async def test_heartbeats_keep_a_silent_stream_from_being_taken_for_dead(
    server: Server, proxy: CuttingProxy, make_client: Callable[..., Client]
) -> None:
    session = server.manager.create_or_replace("chat")
    client = make_client(proxy.url, stall_timeout_s=0.2)
    stream = client.attach("chat")
    first = asyncio.create_task(anext(stream))
    await until(lambda: session.total_size >= 10 * len(": ping\n"))
    session.append_event("at last")
    assert (await first).data == "at last"
    assert len(proxy.requests) == 1


async def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: Server, proxy: CuttingProxy, client: Client
) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event(WORDS[0])
    tries: list[Connection] = []
    stream = client.attach("chat", on_connection=tries.append)
    assert (await anext(stream)).data == WORDS[0]
    await proxy.refuse()
    rest = asyncio.create_task(text_of(stream))
    await until(lambda: len(tries) > 4)
    await proxy.listen()
    for word in WORDS[1:]:
        session.append_event(word)
    session.finalize()
    assert await rest == "".join(WORDS[1:])
    failures = [each for each in tries if each.error]
    assert all(isinstance(each.error, UnreachableError) for each in failures)
    assert failures[0].retry_in_s <= 0.01 < failures[-1].retry_in_s <= 0.05


async def test_a_server_that_stays_away_is_given_up(
    server: Server, proxy: CuttingProxy, make_client: Callable[..., Client]
) -> None:
    server.manager.create_or_replace("chat").append_event("hello")
    client = make_client(proxy.url, give_up_after_s=0.1)
    stream = client.attach("chat")
    await anext(stream)
    await proxy.refuse()
    with pytest.raises(UnreachableError):
        await anext(stream)
    assert stream.state == "streaming"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await proxy.listen()


async def test_connections_that_bring_no_event_are_given_up(
    server: Server, proxy: CuttingProxy, make_client: Callable[..., Client]
) -> None:
    written(server)
    proxy.cuts += [Cut(20)] * 1000
    client = make_client(proxy.url, give_up_after_s=0.2)
    with pytest.raises(UnreachableError, match="connection lost"):
        await text_of(client.attach("chat"))


async def test_where_nothing_ever_listened_is_told_at_once(
    proxy: CuttingProxy, client: Client
) -> None:
    await proxy.refuse()
    with pytest.raises(UnreachableError) as caught:
        await text_of(client.attach("chat"))
    assert caught.value.first_contact
    await proxy.listen()


async def test_a_server_that_restarted_empty_has_no_such_stream(
    server: Server, proxy: CuttingProxy, client: Client
) -> None:
    server.manager.create_or_replace("chat").append_event("hello")
    stream = client.attach("chat")
    assert (await anext(stream)).data == "hello"
    async with serving() as restarted:
        proxy.target = restarted.runner.addresses[0][:2]
        await proxy.refuse()
        await proxy.listen()
        with pytest.raises(GoneError) as caught:
            await anext(stream)
    assert (caught.value.status, caught.value.reason) == (404, "stream_not_found")


async def test_a_reader_that_comes_back_is_not_given_the_text_of_a_newer_stream(
    server: Server, proxy: CuttingProxy, client: Client
) -> None:
    server.manager.create_or_replace("chat").append_event("old")
    stream = client.attach("chat")
    assert (await anext(stream)).data == "old"
    await proxy.refuse()
    newer = server.manager.create_or_replace("chat")
    newer.append_event("new and longer than the old one")
    await proxy.listen()
    with pytest.raises(ReplacedError) as caught:
        await anext(stream)
    assert caught.value.figures["epoch"] == newer.epoch


async def test_bytes_that_are_no_longer_kept_are_an_error_unless_a_gap_is_welcome(
    make_client: Callable[..., Client],
) -> None:
    async with serving(max_session_bytes=4096) as server:
        session = server.manager.create_or_replace("chat")
        for number in range(200):
            session.append_event(f"event {number}")
        session.finalize()
        host, port = server.runner.addresses[0][:2]
        client = make_client(f"http://{host}:{port}")
        with pytest.raises(OffsetLostError) as caught:
            await text_of(client.attach("chat"))
        assert caught.value.first_offset == session.dropped_prefix > 0
        gaps: list[Gap] = []
        events = [event.data async for event in client.attach("chat", on_gap=gaps.append)]
        assert gaps == [Gap(0, session.dropped_prefix)]
        assert events == [f"event {number}" for number in range(200 - len(events), 200)]
        earliest = client.attach("chat", from_="earliest", on_gap=gaps.append)
        assert [event.data async for event in earliest] == events
        assert len(gaps) == 1


async def test_a_reader_that_was_overtaken_goes_on_behind_the_gap(
    make_client: Callable[..., Client],
) -> None:
    async with (
        serving(max_session_bytes=4096) as server,
        cutting_proxy(server.runner.addresses[0][:2]) as proxy,
    ):
        session = server.manager.create_or_replace("chat")
        session.append_event("first")
        gaps: list[Gap] = []
        stream = make_client(proxy.url).attach("chat", on_gap=gaps.append)
        assert (await anext(stream)).data == "first"
        read_before = stream.offset
        await proxy.refuse()
        for number in range(100):
            session.append_event(f"{number} " * 20)
        session.finalize()
        await proxy.listen()
        rest = [event.data async for event in stream]
        assert gaps == [Gap(read_before or 0, session.dropped_prefix)]
        assert rest == [f"{number} " * 20 for number in range(100 - len(rest), 100)]


# --- how it ends


async def test_a_stopped_stream_ends_as_cancelled(server: Server, client: Client) -> None:
    server.manager.create_or_replace("chat").append_event("hello")
    stream = client.attach("chat")
    await anext(stream)
    await client.stop("chat", keep=True)
    assert await text_of(stream) == ""
    assert (stream.state, stream.reason) == ("cancelled", None)
    kept = client.attach("chat")
    assert await text_of(kept) == "hello"
    assert kept.state == "cancelled"
    await client.stop("chat")
    with pytest.raises(GoneError):
        await text_of(client.attach("chat"))


async def test_a_failed_stream_ends_as_failed_behind_its_error_event(
    server: Server, client: Client
) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event("hello")
    session.finalize("failed", "upstream_lost")
    stream = client.attach("chat")
    first, error = [event async for event in stream]
    assert first.data == "hello"
    assert error.json()["error"]["reason"] == "upstream_lost"
    assert (stream.state, stream.reason) == ("failed", "upstream_lost")


async def test_a_stream_that_ended_without_an_event_ends_here_too(
    server: Server, client: Client
) -> None:
    server.manager.create_or_replace("chat").cancel()
    stream = client.attach("chat")
    assert await text_of(stream) == ""
    assert (stream.state, stream.reason) == ("cancelled", "cancelled")


async def test_behind_the_last_byte_the_ending_is_still_told(
    server: Server, client: Client
) -> None:
    session = written(server)
    for stream in (
        client.attach("chat", from_=f"{session.epoch}-{session.total_size}"),
        client.attach("chat", from_=session.total_size - 3),  # within ": end completed"
    ):
        assert await text_of(stream) == ""
        assert stream.state == "completed"


async def test_a_clean_end_without_the_logs_last_line_is_a_loss(
    make_client: Callable[..., Client],
) -> None:
    log = b"data: one\nid: e1-21\n\n: end completed\ndata: two\nid: e1-58\n\n: end completed\n"
    ends = [6, 40, 57, 58, len(log)]  # in a field, behind a comment, in front of a blank line, ...
    asked_for = []

    async def answer(request: web.Request) -> web.Response:
        position = int(request.query["from"].removeprefix("e1-"))
        asked_for.append(position)
        return web.Response(
            body=log[position : ends[len(asked_for) - 1]],
            content_type="text/event-stream",
            headers={"X-Stream-Epoch": "e1", "X-Stream-Offset": str(position)},
        )

    async def answer_lookup(_request: web.Request) -> web.Response:
        told = {"conversation_id": "chat", "state": "completed", "reason": None, "epoch": "e1"}
        counts = {"first_offset": 0, "total_bytes": len(log), "readers": 0}
        times = {"started_at": 1, "completed_at": 2}
        return web.json_response([told | counts | times])

    app = web.Application()
    app.router.add_get("/v1/stream", answer)
    app.router.add_post("/v1/streams/lookup", answer_lookup)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = make_client(f"http://127.0.0.1:{runner.addresses[0][1]}")
        stream = client.attach("chat")
        assert [event.data async for event in stream] == ["one", "two"]
        assert stream.state == "completed"
        assert asked_for == [0, 0, 21, 21, 58]
    finally:
        await runner.cleanup()


def test_a_position_that_is_none_is_refused_before_anything_is_sent() -> None:
    client = Client("http://127.0.0.1:1")
    for position in ("", "-1", "1e3", "e1-", "\N{FULLWIDTH DIGIT ONE}"):
        with pytest.raises(ValueError, match="is not an offset"):
            client.attach("chat", from_=position)
