"""Leaving a stream: it goes on without its reader, who leaves nothing behind and may come back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import pytest
from fake_upstream import STALL, FakeUpstream, answer
from serving import Server, until

from pyserve.client import Client, Connection, EventStream

WORDS = ["Ein ", "Wörtchen ", "gibt ", "das\nnächste", " und 🙂 ", "ein Ende"]


async def text_of(stream: EventStream) -> str:
    return "".join([event.data async for event in stream])


async def test_who_breaks_off_leaves_and_can_go_on_from_there(
    server: Server, client: Client
) -> None:
    session = server.manager.create_or_replace("chat")
    for word in WORDS[:3]:
        session.append_event(word)
    stream = client.attach("chat")
    async for event in stream:
        if event.data == WORDS[1]:
            break
    assert stream.position == event.id
    await stream.close()
    await until(lambda: session.snapshot().readers == 0)
    assert session.is_live
    for word in WORDS[3:]:
        session.append_event(word)
    session.finalize()
    assert await text_of(client.attach("chat", from_=stream.position)) == "".join(WORDS[2:])


async def test_a_forgotten_stream_does_not_stay_attached(server: Server, client: Client) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event("hello")
    async for _ in client.attach("chat"):
        break
    await until(lambda: session.snapshot().readers == 0)


async def test_a_reader_that_is_cancelled_while_it_waits_loses_nothing(
    server: Server, client: Client
) -> None:
    session = server.manager.create_or_replace("chat")
    stream = client.attach("chat")
    received = []
    for word in WORDS:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        session.append_event(word)
        received.append((await anext(stream)).data)
    assert received == WORDS


async def test_closing_the_client_detaches_its_streams(server: Server) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event("hello")
    async with Client(server.url) as client:
        reading = client.attach("chat")
        await anext(reading)
        assert session.snapshot().readers == 1
    await until(lambda: session.snapshot().readers == 0)
    with pytest.raises(StopAsyncIteration):
        await anext(reading)
    assert session.is_live


# --- closed by another task


async def test_close_ends_an_iteration_that_waits_for_an_event(
    server: Server, client: Client
) -> None:
    session = server.manager.create_or_replace("chat")
    session.append_event("hello")
    end = session.total_size
    news: list[Connection] = []
    stream = client.attach("chat", on_connection=news.append)
    reading = asyncio.create_task(text_of(stream))
    await until(lambda: stream.offset == end)
    await stream.close()
    async with asyncio.timeout(1):
        assert await reading == "hello"
    assert stream.state == "streaming"
    assert [each.error for each in news] == [None]


async def test_close_ends_an_iteration_that_waits_for_an_answer(
    upstream: FakeUpstream, make_client: Callable[..., Client]
) -> None:
    upstream.play((STALL,))
    news: list[Connection] = []
    client = make_client(upstream.url)
    reading = asyncio.create_task(text_of(client.attach("chat", on_connection=news.append)))
    asked = await upstream.exchange()
    await client.close()
    async with asyncio.timeout(1):
        assert await reading == ""
    await asked.wait_closed()
    assert news == []


async def test_close_ends_an_iteration_that_waits_for_its_next_try(
    upstream: FakeUpstream, make_client: Callable[..., Client]
) -> None:
    upstream.play(answer(503, Retry_After="30"))
    news: list[Connection] = []
    client = make_client(upstream.url, give_up_after_s=60.0)
    reading = asyncio.create_task(text_of(client.attach("chat", on_connection=news.append)))
    await until(lambda: bool(news))
    await client.close()
    async with asyncio.timeout(1):
        assert await reading == ""
    assert len(news) == 1
    assert news[0].retry_in_s > 30


async def test_close_ends_a_lookup_that_waits_for_its_next_try(
    upstream: FakeUpstream, make_client: Callable[..., Client]
) -> None:
    upstream.play(answer(503, Retry_After="30"))
    client = make_client(upstream.url, give_up_after_s=60.0)
    looking = asyncio.create_task(client.lookup(["chat"]))
    await (await upstream.exchange()).wait_closed()
    await client.close()
    async with asyncio.timeout(1):
        with pytest.raises(RuntimeError, match="closed"):
            await looking


async def test_a_closed_client_cannot_be_used(server: Server) -> None:
    session = server.manager.create_or_replace("chat")
    client = Client(server.url)
    before = client.attach("chat")
    await client.close()
    assert await text_of(before) == ""
    for use in (client.attach, client.read_log, functools.partial(client.submit, {})):
        with pytest.raises(RuntimeError, match="is closed"):
            use("chat")
    for ask in (client.stop("chat"), client.lookup(["chat"])):
        with pytest.raises(RuntimeError, match="is closed"):
            await ask
    await client.close()  # as often as one likes
    assert session.is_live
