"""A generation: one task that produces into one session, whoever reads it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from pyserve import ApiError, Config, StreamSession, StreamSessionManager
from pyserve.producers.generation import Generation, Generations, Produce

Begin = Callable[[], None]

GRACE_S = 30.0  # never waited for


@pytest.fixture
async def generations(manager: StreamSessionManager) -> AsyncIterator[Generations]:
    generations = Generations(manager)
    yield generations
    generations.fail_all(ApiError("shutdown"))
    await generations.wait_idle()


def start(
    generations: Generations, produce: Produce, name: str = "c", grace_s: float = GRACE_S
) -> Generation:
    return generations.start(
        name,
        produce,
        owner="",
        dialect="openai",
        tag=b"",
        grace_until=asyncio.get_running_loop().time() + grace_s,
    )


async def read_all(session: StreamSession) -> bytes:
    return b"".join([block async for block in session.read_from("earliest")])


async def produce_forever(session: StreamSession, begin: Begin) -> str | None:
    begin()
    session.append_event("first")
    await asyncio.Event().wait()
    return None


async def produce_silence(_session: StreamSession, _begin: Begin) -> str | None:
    await asyncio.Event().wait()
    return None


async def produce_one(session: StreamSession, begin: Begin) -> str | None:
    begin()
    session.append_event("one")
    return "unterminated"


async def test_a_generation_runs_to_its_end_without_a_reader(generations: Generations) -> None:
    generation = start(generations, produce_one)
    session = generation.session
    assert session.state == "queued"
    assert generations.get(session) is generation
    await generations.wait_idle()
    assert generations.get(session) is None
    assert (session.state, session.snapshot().reason) == ("completed", "unterminated")
    log = await read_all(session)
    assert log.startswith(b"data: one\n")
    assert log.endswith(b": end completed\n")


async def test_it_is_settled_when_it_has_begun(generations: Generations) -> None:
    generation = start(generations, produce_forever)
    await generation.wait_settled()
    assert generation.session.state == "streaming"


async def test_beginning_without_an_event_settles_it_too(generations: Generations) -> None:
    async def produce(_session: StreamSession, begin: Begin) -> str | None:
        begin()
        await asyncio.Event().wait()
        return None

    generation = start(generations, produce)
    await generation.wait_settled()
    assert (generation.session.state, generation.session.total_size) == ("streaming", 0)


async def test_after_its_grace_nobody_waits_for_it_any_more(generations: Generations) -> None:
    generation = start(generations, produce_silence, grace_s=0.01)
    await generation.wait_settled()
    assert generation.session.state == "queued"


async def test_an_error_within_the_grace_is_refused_and_leaves_no_session(
    generations: Generations, manager: StreamSessionManager
) -> None:
    go = asyncio.Event()

    async def produce(_session: StreamSession, _begin: Begin) -> str | None:
        await go.wait()
        raise ApiError("upstream_unreachable")

    generation = start(generations, produce)
    attached = asyncio.create_task(read_all(generation.session))
    waiting = asyncio.create_task(generation.wait_settled())
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(ApiError) as raised:
        await waiting
    assert raised.value.reason == "upstream_unreachable"
    assert manager.get("c") is None
    assert len(manager) == 0
    # Whoever had attached meanwhile is told in the stream.
    log = await attached
    assert b'"reason":"upstream_unreachable"' in log
    assert log.endswith(b": end failed upstream_unreachable\n")


async def test_a_refused_generation_evicts_no_other_session(
    generations: Generations, manager: StreamSessionManager
) -> None:
    async def refuse(_session: StreamSession, _begin: Begin) -> str | None:
        manager.evict("c")
        manager.create_or_replace("c")
        raise ApiError("upstream_unreachable")

    with pytest.raises(ApiError):
        await start(generations, refuse).wait_settled()
    newer = manager.get("c")
    assert newer is not None
    assert newer.is_live


async def test_an_error_after_the_beginning_is_told_in_the_stream(
    generations: Generations, manager: StreamSessionManager
) -> None:
    async def produce(session: StreamSession, begin: Begin) -> str | None:
        begin()
        session.append("data: whole\n\ndata: half")
        raise ApiError("upstream_lost")

    generation = start(generations, produce)
    await generation.wait_settled()
    log = await read_all(generation.session)
    assert log.startswith(b"data: whole\n")
    assert b"half" not in log
    assert log.endswith(b": end failed upstream_lost\n")
    assert manager.get("c") == generation.session


async def test_an_error_after_the_grace_is_told_in_the_stream(generations: Generations) -> None:
    async def produce(_session: StreamSession, _begin: Begin) -> str | None:
        await asyncio.sleep(0.02)
        raise ApiError("upstream_unreachable")

    generation = start(generations, produce, grace_s=0.001)
    await generation.wait_settled()
    assert (await read_all(generation.session)).endswith(b": end failed upstream_unreachable\n")


async def test_an_unexpected_exception_is_logged_and_never_told(
    generations: Generations, caplog: pytest.LogCaptureFixture
) -> None:
    async def produce(session: StreamSession, begin: Begin) -> str | None:
        begin()
        raise RuntimeError("secret /path")

    with caplog.at_level(logging.ERROR, logger="pyserve"):
        generation = start(generations, produce)
        log = await read_all(generation.session)
    assert log.endswith(b": end failed internal_error\n")
    assert b"secret" not in log
    assert "secret /path" in caplog.text


async def test_an_event_that_is_too_large_is_no_bug_of_the_server(
    generations: Generations, caplog: pytest.LogCaptureFixture
) -> None:
    async def append(session: StreamSession, begin: Begin) -> str | None:
        begin()
        session.append("data: " + "x" * 5000)
        return None

    async def end(session: StreamSession, begin: Begin) -> str | None:
        begin()
        session.append("data: " + "x" * 4085 + "\n")  # its id has no room
        return None

    for produce in (append, end):
        generation = start(generations, produce)
        assert (await read_all(generation.session)).endswith(b": end failed event_too_large\n")
        await generations.wait_idle()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "stop",
    [
        lambda session: session.cancel(),
        lambda session: session.manager.evict_and_cancel("c"),
    ],
)
async def test_a_stop_ends_the_producer_at_once(
    generations: Generations, stop: Callable[[StreamSession], object]
) -> None:
    over = asyncio.Event()

    async def produce(session: StreamSession, begin: Begin) -> str | None:
        try:
            return await produce_forever(session, begin)
        finally:
            over.set()

    generation = start(generations, produce)
    await generation.wait_settled()
    stop(generation.session)
    await over.wait()
    assert generation.session.state == "cancelled"
    assert (await read_all(generation.session)).endswith(b": end cancelled\n")
    await generations.wait_idle()


async def test_a_stop_from_another_thread_wakes_the_loop(generations: Generations) -> None:
    over = asyncio.Event()

    async def produce(session: StreamSession, begin: Begin) -> str | None:
        try:
            return await produce_forever(session, begin)
        finally:
            over.set()

    generation = start(generations, produce)
    await generation.wait_settled()
    idle = asyncio.create_task(generations.wait_idle())
    # When the loop sleeps; not in an executor, the end of whose future would wake it.
    thread = threading.Timer(0.05, generation.session.cancel)
    thread.start()
    async with asyncio.timeout(5):
        await over.wait()
        await idle
    thread.join()


async def test_who_waits_for_a_stopped_generation_is_told(generations: Generations) -> None:
    generation = start(generations, produce_silence)
    waiting = asyncio.create_task(generation.wait_settled())
    await asyncio.sleep(0)
    generation.session.cancel()
    with pytest.raises(ApiError) as raised:
        await waiting
    assert (raised.value.reason, raised.value.status) == ("cancelled", 400)


async def test_who_waits_for_a_replaced_generation_is_told(generations: Generations) -> None:
    first = start(generations, produce_silence)
    waiting = asyncio.create_task(first.wait_settled())
    await asyncio.sleep(0)
    second = start(generations, produce_forever)
    with pytest.raises(ApiError) as raised:
        await waiting
    assert (raised.value.reason, raised.value.status) == ("replaced", 409)
    await second.wait_settled()
    assert generations.get(first.session) is None
    assert generations.get(second.session) is second


async def test_a_generation_stopped_before_its_first_step_is_over(
    generations: Generations,
) -> None:
    generation = start(generations, produce_forever)
    generation.session.cancel()
    with pytest.raises(ApiError) as raised:
        await generation.wait_settled()
    assert raised.value.reason == "cancelled"
    await generations.wait_idle()


async def test_a_generation_stopped_while_it_is_made_never_produces(
    generations: Generations, manager: StreamSessionManager
) -> None:
    produced: list[StreamSession] = []

    async def produce(session: StreamSession, _begin: Begin) -> str | None:
        produced.append(session)
        return None

    manager.create_or_replace("c", on_cancel=lambda: manager.evict_and_cancel("c"))
    generation = start(generations, produce)
    with pytest.raises(ApiError) as raised:
        await generation.wait_settled()
    assert raised.value.reason == "cancelled"
    await generations.wait_idle()
    assert produced == []


async def test_a_producer_that_appends_after_a_stop_just_ends(
    generations: Generations, caplog: pytest.LogCaptureFixture
) -> None:
    async def produce(session: StreamSession, begin: Begin) -> str | None:
        begin()
        session.cancel()
        session.append_event("too late")
        return None

    generation = start(generations, produce)
    assert await read_all(generation.session) == b": end cancelled\n"
    assert caplog.records == []


async def test_all_are_failed_at_a_shutdown_each_in_its_own_words(
    generations: Generations,
) -> None:
    loop = asyncio.get_running_loop()
    running = [
        generations.start(
            dialect,
            produce_forever,
            owner="",
            dialect=dialect,
            tag=b"",
            grace_until=loop.time() + GRACE_S,
        )
        for dialect in ("openai", "anthropic")
    ]
    for generation in running:
        await generation.wait_settled()
    generations.fail_all(ApiError("shutdown"))
    await generations.wait_idle()
    openai, anthropic = [await read_all(generation.session) for generation in running]
    assert openai.endswith(b": end failed shutdown\n")
    assert b"event: error" not in openai
    assert b'event: error\ndata: {"type":"error"' in anthropic


async def test_a_full_budget_refuses_a_generation() -> None:
    manager = StreamSessionManager(Config(max_session_bytes=4096, max_total_bytes=64 * 1024))
    live = [manager.create_or_replace(str(number)) for number in range(64)]
    generations = Generations(manager)
    with pytest.raises(ApiError) as raised:
        start(generations, produce_forever)
    assert (raised.value.reason, raised.value.status) == ("memory_budget", 503)
    assert raised.value.retry_after_s == 1
    await generations.wait_idle()
    assert all(session.is_live for session in live)


def test_a_loop_that_closes_fails_what_runs(manager: StreamSessionManager) -> None:
    sessions: list[StreamSession] = []

    async def begin_and_leave() -> None:
        generation = start(Generations(manager), produce_forever)
        await generation.wait_settled()
        sessions.append(generation.session)

    asyncio.run(begin_and_leave())
    assert (sessions[0].state, sessions[0].snapshot().reason) == ("failed", "shutdown")
