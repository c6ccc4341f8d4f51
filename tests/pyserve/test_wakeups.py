"""One descriptor for each event loop, no polling, and nothing kept of who stopped waiting."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading
import weakref

import pytest

from pyserve import Config, StreamSession, StreamSessionManager, _core
from pyserve.sessions import SessionReader
from pyserve.wakeups import LoopWaker, running_loop_waker


def is_readable(wakeup: _core.Wakeup) -> bool:
    return bool(select.select([wakeup.fd], [], [], 0)[0])


async def read_all(reader: SessionReader) -> bytes:
    return b"".join([block async for block in reader])


def test_the_descriptor_is_readable_while_tokens_wait(session: StreamSession) -> None:
    wakeup = _core.Wakeup()
    reader = session._core.attach(0)
    assert reader.notify_when_readable(wakeup, 7) is True
    assert not is_readable(wakeup)
    session.append_event("a")
    session.append_event("b")
    assert is_readable(wakeup)
    assert wakeup.drain() == [7]
    assert not is_readable(wakeup)
    assert wakeup.drain() == []


def test_asking_when_there_is_news_already_is_answered_at_once(session: StreamSession) -> None:
    wakeup = _core.Wakeup()
    reader = session._core.attach(0)
    session.append_event("a")
    assert reader.notify_when_readable(wakeup, 1) is False
    while reader.read(1000):
        pass
    assert reader.notify_when_readable(wakeup, 2) is True
    session.finalize()
    assert wakeup.drain() == [2]
    assert reader.notify_when_readable(wakeup, 3) is False


def test_who_is_forgotten_is_not_woken(session: StreamSession) -> None:
    wakeup = _core.Wakeup()
    reader = session._core.attach(0)
    for token in (1, 2, 3):
        reader.notify_when_readable(wakeup, token)
    reader.forget(wakeup, 2)
    reader.forget(wakeup, 99)
    session.append_event("a")
    assert wakeup.drain() == [1, 3]


def test_a_closed_wakeup_takes_no_news(session: StreamSession) -> None:
    wakeup = _core.Wakeup()
    fd = wakeup.fd
    reader = session._core.attach(0)
    reader.notify_when_readable(wakeup, 1)
    wakeup.close()
    wakeup.close()
    session.append_event("a")
    assert wakeup.drain() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_wakeup_closes_its_descriptor_when_it_goes() -> None:
    wakeup = _core.Wakeup()
    fd = wakeup.fd
    del wakeup
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_a_loop_has_one_waker() -> None:
    assert running_loop_waker() is running_loop_waker()


async def test_a_cancelled_wait_is_forgotten_on_both_sides(session: StreamSession) -> None:
    waker = running_loop_waker()
    tasks = [asyncio.create_task(read_all(session.read_from())) for _ in range(3)]
    await asyncio.sleep(0)
    assert len(waker._waiting) == 3
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert len(waker._waiting) == 2
    session.append_event("a")
    assert len(waker.wakeup.drain()) == 2  # the core knows no third
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert waker._waiting == {}


async def test_news_for_who_has_just_left_are_passed_over(session: StreamSession) -> None:
    waker = running_loop_waker()
    stays = asyncio.create_task(read_all(session.read_from()))
    leaves = asyncio.create_task(read_all(session.read_from()))
    await asyncio.sleep(0)
    session.append_event("a")  # both are told
    leaves.cancel()
    session.finalize()
    assert (await stays).endswith(b": end completed\n")
    assert waker._waiting == {}
    assert leaves.cancelled()


def test_a_session_outlives_the_loop_that_read_it(session: StreamSession) -> None:
    async def read_one() -> bytes:
        reader = session.read_from("earliest")
        waiting = asyncio.create_task(read_all(reader))
        await asyncio.sleep(0)
        session.append_event("a")
        await asyncio.sleep(0)
        waiting.cancel()
        return await anext(session.read_from("earliest"))

    first, second = asyncio.run(read_one()), asyncio.run(read_one())
    assert first.count(b"data: a\n") == 1
    assert second.count(b"data: a\n") == 2
    assert session.is_live


def test_a_loop_that_was_closed_with_waiting_readers_disturbs_nobody(
    session: StreamSession,
) -> None:
    kept: list[asyncio.Task[bytes]] = []

    async def leave_waiting() -> None:
        kept.append(asyncio.create_task(read_all(session.read_from())))
        await asyncio.sleep(0)

    asyncio.run(leave_waiting())
    assert kept[0].cancelled()
    session.append_event("a")
    session.finalize()
    assert asyncio.run(read_all(session.read_from())).endswith(b": end completed\n")


def test_a_waker_goes_with_its_loop() -> None:
    wakers: list[weakref.ref[LoopWaker]] = []

    async def read_something() -> None:
        session = StreamSessionManager(Config()).create_or_replace("c")
        reading = asyncio.create_task(read_all(session.read_from()))
        await asyncio.sleep(0)
        session.finalize()
        await reading
        wakers.append(weakref.ref(running_loop_waker()))

    for _ in range(3):
        asyncio.run(read_something())
    gc.collect()
    assert [waker() for waker in wakers] == [None, None, None]


def test_loops_in_two_threads_read_the_same_session() -> None:
    session = StreamSessionManager(Config()).create_or_replace("c")
    logs: list[bytes] = []
    attached = threading.Barrier(3)

    async def read() -> None:
        reader = session.read_from()
        attached.wait()
        logs.append(await read_all(reader))

    threads = [threading.Thread(target=lambda: asyncio.run(read())) for _ in range(2)]
    for thread in threads:
        thread.start()
    attached.wait()
    for number in range(500):
        session.append_event(str(number))
    session.finalize()
    for thread in threads:
        thread.join()
    assert logs[0] == logs[1]
    assert logs[0].count(b"\n\n") == 500
