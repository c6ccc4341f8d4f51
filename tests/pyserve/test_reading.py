"""Readers wait, wake, fall behind, leave; and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from pyserve import ApiError, Config, StreamSession, StreamSessionManager, _core
from pyserve.sessions import READ_BYTES, SessionReader


async def read_all(reader: SessionReader) -> bytes:
    return b"".join([block async for block in reader])


async def next_block(reader: SessionReader) -> bytes:
    return await anext(reader)


async def until_waiting(*tasks: asyncio.Task[bytes]) -> None:
    """Let the tasks run until each waits for news: nothing is ready, so a few turns do."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_a_reader_waits_for_an_event_and_for_the_end(session: StreamSession) -> None:
    reader = session.read_from()
    waiting = asyncio.create_task(next_block(reader))
    await until_waiting(waiting)
    session.append("data: unfi")
    await until_waiting(waiting)
    session.append("nished\n\n")
    assert (await waiting).startswith(b"data: unfinished\n")
    last = asyncio.create_task(read_all(reader))
    await until_waiting(last)
    session.finalize()
    assert await last == b": end completed\n"


@pytest.mark.parametrize("end", [StreamSession.finalize, StreamSession.cancel])
async def test_every_ending_wakes_and_ends_every_reader(
    session: StreamSession, end: Callable[[StreamSession], bool]
) -> None:
    tasks = [asyncio.create_task(read_all(session.read_from())) for _ in range(10)]
    await until_waiting(*tasks)
    assert session.snapshot().readers == 10
    end(session)
    logs = await asyncio.gather(*tasks)
    assert len(set(logs)) == 1
    assert logs[0].startswith(b": end c")
    assert session.snapshot().readers == 0


async def test_a_heartbeat_wakes_a_reader(
    manager: StreamSessionManager, clock: _core.ManualClock
) -> None:
    session = manager.create_or_replace("c")
    waiting = asyncio.create_task(next_block(session.read_from()))
    await until_waiting(waiting)
    clock.advance(1.0)
    ticking = asyncio.create_task(manager.run())
    assert await waiting == b": ping\n"
    ticking.cancel()


async def test_many_readers_of_many_sessions_each_get_every_byte() -> None:
    manager = StreamSessionManager(Config())
    sessions = [manager.create_or_replace(str(number)) for number in range(10)]
    tasks = [asyncio.create_task(read_all(s.read_from())) for s in sessions for _ in range(10)]
    for turn in range(50):
        for session in sessions:
            session.append_event(f"{session.conversation_id} {turn}")
        if turn % 3 == 0:
            await asyncio.sleep(0)
    for session in sessions:
        session.finalize()
    logs = await asyncio.gather(*tasks)
    for number, session in enumerate(sessions):
        expected = await read_all(session.read_from())
        assert len(expected) == session.total_size
        assert logs[number * 10 : number * 10 + 10] == [expected] * 10


async def test_events_from_a_thread_wake_a_reader_in_the_loop() -> None:
    session = StreamSessionManager(Config()).create_or_replace("c")

    def produce() -> None:
        for number in range(1000):
            session.append_event(str(number))
        session.finalize()

    reading = asyncio.create_task(read_all(session.read_from()))
    await until_waiting(reading)
    await asyncio.to_thread(produce)
    log = await reading
    numbers = [line for line in log.split(b"\n") if line.startswith(b"data")]
    assert numbers == [b"data: %d" % number for number in range(1000)]


async def test_the_selector_wakes_once_for_a_batch_of_readers(session: StreamSession) -> None:
    wakeup = _core.Wakeup()
    readers = [session._core.attach(0) for _ in range(100)]
    for token, reader in enumerate(readers):
        assert reader.notify_when_readable(wakeup, token) is True
    woken = asyncio.Event()
    drained: list[list[int]] = []

    def on_ready() -> None:
        drained.append(wakeup.drain())
        woken.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(wakeup.fd, on_ready)
    session.append_event("a")
    session.append_event("b")
    await woken.wait()
    await asyncio.sleep(0.01)  # nothing more comes
    loop.remove_reader(wakeup.fd)
    assert drained == [list(range(100))]


async def test_blocks_are_bounded_and_join_to_the_log() -> None:
    session = StreamSessionManager(Config()).create_or_replace("c")
    for number in range(1000):
        session.append_event(f"{number} " + "x" * 300)
    session.finalize()
    blocks = [block async for block in session.read_from()]
    assert max(map(len, blocks)) <= READ_BYTES
    assert sum(map(len, blocks)) == session.total_size
    assert b"".join(blocks).count(b"\n\n") == 1000


async def test_a_waiting_reader_that_is_cancelled_leaves_nothing_behind(
    session: StreamSession,
) -> None:
    reader = session.read_from()
    waiting = asyncio.create_task(next_block(reader))
    await until_waiting(waiting)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    # It is still attached, but nobody waits: the next event writes to no wake-up.
    assert session.snapshot().readers == 1
    session.append_event("a")
    assert await next_block(reader) != b""
    reader.close()
    assert session.snapshot().readers == 0


async def test_a_reader_cancelled_in_the_moment_of_its_news_loses_no_byte(
    session: StreamSession,
) -> None:
    reader = session.read_from()
    waiting = asyncio.create_task(next_block(reader))
    await until_waiting(waiting)
    session.append_event("a")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert reader.offset == 0
    assert (await next_block(reader)).startswith(b"data: a\n")


async def test_a_timeout_around_a_read_loses_no_byte(session: StreamSession) -> None:
    reader = session.read_from()
    for number in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await next_block(reader)
        session.append_event(str(number))
        assert (await next_block(reader)).startswith(b"data: %d\n" % number)


async def test_a_dropped_reader_is_no_reader(session: StreamSession) -> None:
    tasks = [asyncio.create_task(read_all(session.read_from())) for _ in range(5)]
    await until_waiting(*tasks)
    assert session.snapshot().readers == 5
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    del tasks, task
    await asyncio.sleep(0)  # the loop still holds the last one's exception
    gc.collect()
    assert session.snapshot().readers == 0


async def test_a_closed_reader_has_ended(session: StreamSession) -> None:
    session.append_event("a")
    reader = session.read_from()
    reader.close()
    reader.close()
    assert await read_all(reader) == b""
    assert session.snapshot().readers == 0


async def test_a_reader_that_was_overtaken_while_it_waited_is_told(session: StreamSession) -> None:
    session.append_event("read")
    reader = session.read_from()
    await next_block(reader)
    waiting = asyncio.create_task(next_block(reader))
    await until_waiting(waiting)
    for _ in range(30):
        session.append_event("x" * 300)
    with pytest.raises(ApiError) as raised:
        await waiting
    assert raised.value.reason == "offset_lost"
    assert raised.value.figures["epoch"] == session.epoch


async def test_a_reader_survives_the_eviction_of_its_session(
    manager: StreamSessionManager,
) -> None:
    session = manager.create_or_replace("c")
    session.append_event("a")
    reading = asyncio.create_task(read_all(session.read_from()))
    await until_waiting(reading)
    manager.evict_and_cancel("c")
    log = await reading
    assert log.startswith(b"data: a\n")
    assert log.endswith(b": end cancelled\n")
    assert manager.get("c") is None
