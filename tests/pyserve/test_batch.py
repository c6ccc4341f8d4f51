"""Continuous batching, with a model that takes a step only when the test lets it."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest
from gated_model import LIMIT_S, GatedModel, State, ask, batching, text_of

from pyserve import ApiError, ConfigError
from pyserve.producers.batch import Batcher, Token


@pytest.fixture
async def model() -> AsyncIterator[GatedModel]:
    return GatedModel()


async def cancel(task: asyncio.Task[str]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_request_joins_between_two_steps_of_another(model: GatedModel) -> None:
    async with batching(model) as batcher:
        first = await ask(batcher, "a", 3)
        assert await model.entered() == ["a"]
        second = await ask(batcher, "b", 2)
        model.open()
        assert await model.entered() == ["a", "b"]
        model.open(2)
        assert (await first, await second) == ("aaa", "bb")


async def test_a_request_that_ends_leaves_while_the_other_goes_on(model: GatedModel) -> None:
    async with batching(model, size=2, wait_ms=LIMIT_S * 1000) as batcher:
        tasks = [await ask(batcher, "a", 1), await ask(batcher, "b", 2)]
        assert await model.entered() == ["a", "b"]
        model.open()
        assert await model.entered() == ["b"]
        assert await tasks[0] == "a"
        model.open()
        assert await tasks[1] == "bb"


async def test_a_batch_is_never_larger_than_its_limit_and_a_free_place_is_taken_at_once(
    model: GatedModel,
) -> None:
    async with batching(model, size=2, wait_ms=LIMIT_S * 1000) as batcher:
        tasks = [
            await ask(batcher, name, length) for name, length in [("a", 2), ("b", 1), ("c", 1)]
        ]
        assert await model.entered() == ["a", "b"]
        model.open()
        assert await model.entered() == ["a", "c"]
        model.open()
        assert [await task for task in tasks] == ["aa", "b", "c"]


async def test_requests_join_in_the_order_in_which_they_came(model: GatedModel) -> None:
    async with batching(model, size=2) as batcher:
        tasks = [await ask(batcher, name) for name in "abcdefg"]
        model.open_for_good()
        assert [await task for task in tasks] == list("abcdefg")
    assert model.started == list("abcdefg")


async def test_without_a_wait_a_request_starts_alone(model: GatedModel) -> None:
    async with batching(model, size=4, wait_ms=0) as batcher:
        task = await ask(batcher, "a")
        assert await model.entered() == ["a"]
        model.open()
        assert await task == "a"


async def test_an_idle_batch_waits_for_company_from_the_first_arrival_on(
    model: GatedModel,
) -> None:
    now_s = 0.0
    batcher = Batcher(model, max_batch_size=4, max_batch_wait_ms=20, clock=lambda: now_s)
    async with batcher:
        tasks = [await ask(batcher, "a")]
        now_s = 0.012
        tasks.append(await ask(batcher, "b"))
        now_s = 0.019
        tasks.append(await ask(batcher, "c"))
        assert model.started == []
        now_s = 0.020  # counted from the others' arrival it would not be over yet
        assert await model.entered() == ["a", "b", "c"]
        model.open()
        await asyncio.gather(*tasks)


async def test_who_leaves_before_the_batch_starts_no_longer_counts_as_company(
    model: GatedModel,
) -> None:
    loop_thread = threading.current_thread()
    loop = asyncio.get_running_loop()
    looks: asyncio.Queue[None] = asyncio.Queue()

    def clock() -> float:
        if threading.current_thread() is not loop_thread:
            loop.call_soon_threadsafe(looks.put_nowait, None)
        return 0.0

    batcher = Batcher(model, max_batch_size=2, max_batch_wait_ms=LIMIT_S * 1000, clock=clock)
    async with batcher:
        first = await ask(batcher, "a")
        await looks.get()  # to wait for the rest of its time
        await cancel(first)
        tasks = [await ask(batcher, "b")]
        await looks.get()  # again: this is not the second, it is the first
        tasks.append(await ask(batcher, "c"))
        assert await model.entered() == ["b", "c"]
        model.open()
        await asyncio.gather(*tasks)


async def test_a_full_batch_waits_for_nobody(model: GatedModel) -> None:
    async with batching(model, size=2, wait_ms=LIMIT_S * 1000) as batcher:
        tasks = [await ask(batcher, "a"), await ask(batcher, "b")]
        assert await model.entered() == ["a", "b"]
        model.open()
        await asyncio.gather(*tasks)


async def test_a_cancelled_request_is_not_in_the_next_step(model: GatedModel) -> None:
    async with batching(model) as batcher:
        first = await ask(batcher, "a", 9)
        await model.entered()
        second = await ask(batcher, "b", 2)
        model.open()
        assert await model.entered() == ["a", "b"]
        await cancel(first)
        model.open()
        assert await model.entered() == ["b"]
        model.open()
        assert await second == "bb"


async def test_a_request_cancelled_while_it_waits_never_reaches_the_model(
    model: GatedModel,
) -> None:
    async with batching(model, size=1) as batcher:
        tasks = [await ask(batcher, name) for name in "abc"]
        await model.entered()
        await cancel(tasks[1])
        model.open_for_good()
        assert (await tasks[0], await tasks[2]) == ("a", "c")
    assert model.started == ["a", "c"]


async def test_a_request_cancelled_while_another_is_started_is_not_started(
    model: GatedModel,
) -> None:
    in_start = asyncio.Event()
    loop = asyncio.get_running_loop()
    may_go_on = threading.Event()

    def hold(state: State) -> None:
        loop.call_soon_threadsafe(in_start.set)
        assert may_go_on.wait(LIMIT_S)

    model.on_state = hold
    async with batching(model, size=2, wait_ms=LIMIT_S * 1000) as batcher:
        tasks = [await ask(batcher, name) for name in "ab"]
        await in_start.wait()
        await cancel(tasks[1])
        may_go_on.set()
        assert await model.entered() == ["a"]
        model.open()
        assert await tasks[0] == "a"
    assert model.started == ["a"]


async def test_closing_the_iterator_leaves_too(model: GatedModel) -> None:
    async with batching(model, size=1) as batcher:
        async with aclosing(batcher.generate(("a", 9))) as tokens:
            model.open()
            assert await anext(tokens) == Token("a")
        other = await ask(batcher, "b")
        model.open_for_good()
        assert await other == "b"


async def test_a_state_is_let_go_on_the_worker_thread_when_its_request_is_over(
    model: GatedModel,
) -> None:
    gone_on: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def note() -> None:
        loop.call_soon_threadsafe(gone_on.put_nowait, threading.current_thread().name)

    model.on_state = lambda state: weakref.finalize(state, note)
    model.open_for_good()
    async with batching(model) as batcher, aclosing(batcher.generate(("a", 1))) as tokens:
        assert await anext(tokens) == Token("a", "stop")
        assert await gone_on.get() == "pyserve batch"  # with the iterator still open


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)])
async def test_a_start_that_raises_fails_only_its_own_request(
    model: GatedModel, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with batching(model, size=2) as batcher:
        running = await ask(batcher, "a", 2)
        await model.entered()
        model.start_error = error
        failing = await ask(batcher, "b")
        model.open_for_good()
        with pytest.raises(ApiError) as raised:
            await failing
        assert await running == "aa"
        assert await text_of(batcher, "c", 1) == "c"
    assert raised.value.reason == "generation_failed"
    assert raised.value.__cause__ is error
    assert "failed to start" in caplog.text


async def test_what_a_start_refuses_in_its_own_words_is_told_in_these(model: GatedModel) -> None:
    model.start_error = ApiError("context_overflow")
    async with batching(model) as batcher:
        with pytest.raises(ApiError) as raised:
            await text_of(batcher, "a", 1)
    assert raised.value.reason == "context_overflow"


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)])
async def test_a_step_that_raises_fails_its_requests_and_the_next_are_served(
    model: GatedModel, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with batching(model, size=2) as batcher:
        tasks = [await ask(batcher, name, 9) for name in "ab"]
        tasks.append(await ask(batcher, "c"))
        await model.entered()
        model.open()
        assert await model.entered() == ["a", "b"]
        model.step_error = error
        model.open_for_good()
        assert await model.entered() == ["c"]
        failures = await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert await tasks[2] == "c"
    reasons = [failure.reason for failure in failures if isinstance(failure, ApiError)]
    assert reasons == ["generation_failed", "generation_failed"]
    assert failures[0] is not failures[1]
    assert "failed in a step of 2 requests" in caplog.text


async def test_a_step_with_too_many_tokens_is_a_failed_step(
    model: GatedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.extra_tokens = [Token("whose?")]
    model.open_for_good()
    async with batching(model) as batcher:
        with pytest.raises(ApiError) as raised:
            await text_of(batcher, "a", 1)
        assert str(raised.value.__cause__) == "step() gave 2 tokens for 1 states"
        model.extra_tokens = []
        assert await text_of(batcher, "b", 1) == "b"


async def test_the_tokens_of_a_step_cross_to_the_loop_in_one_call(
    model: GatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    call_soon_threadsafe = loop.call_soon_threadsafe
    delivered: list[int] = []

    def spy(callback: Callable[..., None], *args: Sequence[object]) -> asyncio.Handle:
        if getattr(callback, "__name__", "") == "_deliver":
            delivered.append(len(args[0]))
        return call_soon_threadsafe(callback, *args)

    async with batching(model, size=3, wait_ms=LIMIT_S * 1000) as batcher:
        monkeypatch.setattr(loop, "call_soon_threadsafe", spy)
        tasks = [await ask(batcher, name, 2) for name in "abc"]
        model.open(2)
        await asyncio.gather(*tasks)
        assert delivered == [3, 3]


async def test_stopping_fails_what_runs_and_what_waits_and_leaves_no_thread(
    model: GatedModel,
) -> None:
    async with batching(model, size=1) as batcher:
        tasks = [await ask(batcher, name, 9) for name in "ab"]
        await model.entered()
        assert "pyserve batch" in [thread.name for thread in threading.enumerate()]
    for task in tasks:
        with pytest.raises(ApiError) as raised:
            await task
        assert raised.value.reason == "shutdown"
    assert "pyserve batch" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ApiError, match="shutting down"):
        await text_of(batcher, "c", 1)


async def test_an_idle_batcher_stops_too(model: GatedModel) -> None:
    async with batching(model):
        pass
    assert "pyserve batch" not in [thread.name for thread in threading.enumerate()]


async def test_a_batcher_that_was_not_entered_says_so(model: GatedModel) -> None:
    batcher = Batcher(model, max_batch_size=1, max_batch_wait_ms=0)
    with pytest.raises(RuntimeError, match="async with"):
        await text_of(batcher, "a", 1)


@pytest.mark.parametrize(("size", "wait_ms"), [(0, 0), (1, -1), (1, float("nan"))])
async def test_limits_that_cannot_work_are_refused(
    model: GatedModel, size: int, wait_ms: float
) -> None:
    with pytest.raises(ConfigError):
        Batcher(model, max_batch_size=size, max_batch_wait_ms=wait_ms)


async def test_whatever_comes_and_goes_each_request_gets_its_own_tokens(
    model: GatedModel,
) -> None:
    dice = random.Random(5)
    sizes: list[int] = []
    step = model.step

    def counting_step(states: Sequence[State]) -> list[Token]:
        sizes.append(len(states))
        return step(states)

    model.step = counting_step  # type: ignore[method-assign]
    model.open_for_good()
    async with batching(model, size=8) as batcher:
        lengths = [dice.randint(1, 20) for _ in range(200)]
        tasks = [await ask(batcher, chr(0x4E00 + i), length) for i, length in enumerate(lengths)]
        leavers = set(dice.sample(range(200), 40))
        for i in leavers:
            tasks[i].cancel()
        texts = await asyncio.gather(*tasks, return_exceptions=True)
    for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        assert text == chr(0x4E00 + i) * length or (
            i in leavers and isinstance(text, asyncio.CancelledError)
        )
    assert max(sizes) == 8
