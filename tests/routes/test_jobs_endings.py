"""However a job ends, it says so once, and its status agrees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_upstream import (
    DONE,
    RESET,
    SSE_HEAD,
    STALL,
    FakeUpstream,
    answer,
    chunk,
    stream,
    token,
)
from jobs import Jobs, check_description, check_job, finish, jobs_on, told_in
from serving import Response, until

from pyserve.app import CONTEXT, drain
from pyserve.jobs.job import Job
from pyserve.jobs.translator import Translator


@pytest.fixture
async def jobs(upstream: FakeUpstream) -> AsyncIterator[Jobs]:
    """One slot, and little patience."""
    upstream.play(stream(token("t"), DONE))
    async with jobs_on(upstream, upstream_idle_timeout_s=0.2, max_session_bytes=8192) as jobs:
        yield jobs


ERROR = b'data: {"error": {"message": "out of cards", "code": 500}}\n\n'
UPSTREAM_ENDS: dict[str, tuple[Any, str]] = {
    "before a byte": (b"", "upstream_lost"),
    "within its head": (b"HTTP/1.1 200 OK\r\nContent-", "upstream_lost"),
    "a head that is none": (b"SSH-2.0-OpenSSH\r\n\r\n", "upstream_invalid"),
    "its own error": (answer(500, {"error": {"message": "no"}}), "upstream_error"),
    "it loads": (answer(503, {"error": {"type": "unavailable_error"}}), "model_loading"),
    "it wants a key": (answer(401, {"error": {"message": "key?"}}), "upstream_auth"),
    "no stream": (answer(200, b"<html>", kind="text/html"), "upstream_not_sse"),
    "after its head": ((SSE_HEAD, RESET), "upstream_lost"),
    "within an event": ((SSE_HEAD, chunk(b"data: {"), RESET), "upstream_lost"),
    "after a token": ((SSE_HEAD, chunk(token("t")), RESET), "upstream_lost"),
    "an error in the stream": (stream(token("t"), ERROR), "upstream_error"),
    "words that are no JSON": (stream(token("t"), b"data: ???\n\n"), "upstream_invalid"),
    "silence": ((SSE_HEAD, chunk(token("t")), STALL), "upstream_timeout"),
    "a huge token": (stream(token("t"), token("x" * 9000)), "event_too_large"),
}


@pytest.mark.parametrize(("script", "reason"), UPSTREAM_ENDS.values(), ids=UPSTREAM_ENDS)
async def test_an_upstream_that_fails_fails_the_job(
    jobs: Jobs, upstream: FakeUpstream, script: Any, reason: str
) -> None:
    upstream.play(script)
    job, told = await jobs.finish(await jobs.submit())
    assert (job["status"], job["reason"], told[-1].name) == ("error", reason, "job_error")
    assert job["error"]["code"] >= 400
    has_token = any(event.name == "token" for event in told)
    assert job["output"]["text"] == ("t" if has_token else "")


async def test_an_upstream_that_is_not_there_fails_the_job(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    upstream._server.close()
    job, _ = await jobs.finish(await jobs.submit())
    assert job["reason"] == "upstream_unreachable"


async def test_an_upstreams_message_is_told_with_the_job(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    upstream.play(stream(ERROR))
    job, _ = await jobs.finish(await jobs.submit())
    assert job["error"] == {
        "code": 502,
        "type": "upstream_error",
        "message": "out of cards",
        "reason": "upstream_error",
    }


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ((token("t"), DONE), None),
        ((token("t"), finish("stop"), DONE), "stop"),
        ((token("t"), finish("length"), DONE), "length"),
        ((token("t"), finish("a word of its own"), DONE), None),
        ((token("t"),), "unterminated"),
        ((), "unterminated"),
    ],
)
async def test_a_job_that_is_done_tells_why_the_model_stopped(
    jobs: Jobs, upstream: FakeUpstream, events: tuple[bytes, ...], reason: str | None
) -> None:
    upstream.play(stream(*events))
    job, told = await jobs.finish(await jobs.submit())
    assert (job["status"], job["reason"], told[-1].name) == ("done", reason, "job_complete")


async def test_once_all_is_said_it_does_not_matter_how_the_connection_ends(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("t") + DONE), RESET))
    job, _ = await jobs.finish(await jobs.submit())
    assert job["status"] == "done"


# --- stopped


async def _cancel(jobs: Jobs, job_id: str) -> None:
    assert (await jobs.cancel(job_id))["status"] == "cancelled"


async def _stop(jobs: Jobs, job_id: str) -> None:
    target = f"/v1/stream?job_id={job_id}&keep=true"
    assert (await jobs.server.fetch("DELETE", target)).status == 204


async def _stop_by_conversation(jobs: Jobs, job_id: str) -> None:
    target = f"/v1/stream/{(await jobs.describe(job_id))['conversation_id']}?keep=true"
    assert (await jobs.server.fetch("DELETE", target)).status == 204


STAGES: dict[str, tuple[Any, bytes]] = {
    "before the head": (STALL, b"job_started"),
    "before a token": ((SSE_HEAD, STALL), b"job_started"),
    "after a token": ((SSE_HEAD, chunk(token("t")), STALL), b"event: token"),
}


@pytest.mark.parametrize("stop", [_cancel, _stop, _stop_by_conversation])
@pytest.mark.parametrize(("script", "seen"), STAGES.values(), ids=STAGES)
async def test_a_running_job_stops_and_its_upstream_is_left(
    upstream: FakeUpstream, stop: Any, script: Any, seen: bytes
) -> None:
    upstream.play((script,) if script == STALL else script)
    async with jobs_on(upstream) as jobs:
        job_id = await jobs.submit()
        await (await jobs.open(job_id)).read_until(seen)
        exchange = await upstream.exchange()
        await stop(jobs, job_id)
        await exchange.wait_closed()
        job, told = await jobs.finish(job_id)
        assert (job["status"], job["reason"]) == ("cancelled", "cancelled")
        assert told[-1].name == "job_cancelled"
        assert await jobs.cancel(job_id) == job  # however often


@pytest.mark.parametrize("stop", [_cancel, _stop, _stop_by_conversation])
async def test_a_waiting_job_stops_and_leaves_the_queue(upstream: FakeUpstream, stop: Any) -> None:
    upstream.play((SSE_HEAD, STALL))
    async with jobs_on(upstream) as jobs:
        await jobs.submit()
        job_id = await jobs.submit()
        behind = await jobs.open(await jobs.submit())
        await stop(jobs, job_id)
        job, told = await jobs.finish(job_id)
        assert [event.name for event in told] == ["job_queued", "job_cancelled"]
        assert (job["started_at"], job["metrics"]["tokens"]) == (None, 0)
        await behind.read_until(b'"queue_position":1')
        assert len(upstream.exchanges) == 1


async def test_a_job_that_is_over_stays_as_it_is(jobs: Jobs) -> None:
    job, _ = await jobs.finish(await jobs.submit())
    assert job["status"] == "done"
    assert await jobs.cancel(job["job_id"]) == job


@pytest.mark.parametrize("by", ["job_id", "conv_id"])
async def test_a_delete_tells_its_readers_and_drops_the_log(
    upstream: FakeUpstream, by: str
) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    async with jobs_on(upstream) as jobs:
        job_id = await jobs.submit(conversation_id="c")
        reader = await jobs.open(job_id)
        await reader.read_until(b"event: token")
        target = f"/v1/stream?{by}={job_id if by == 'job_id' else 'c'}"
        assert (await jobs.server.fetch("DELETE", target)).status == 204
        told = told_in(await reader.read_to_end())
        assert (reader.end, told[-1].name) == ("clean", "job_cancelled")
        assert (await jobs.open(job_id)).status == 404
        assert await jobs.status(job_id) == 404
        assert len(jobs.server.app[CONTEXT].jobs) == 0
        assert (await jobs.server.fetch("DELETE", target)).status == 204


async def test_a_delete_can_be_limited_to_one_epoch(jobs: Jobs) -> None:
    first, second = [await jobs.submit(conversation_id="c") for _ in range(2)]
    await jobs.finish(second)
    epoch = (await jobs.open(first)).headers["x-stream-epoch"]
    stale = await jobs.server.fetch("DELETE", "/v1/stream/c", {"If-Match": '"0"'})
    assert (stale.status, stale.error["reason"]) == (412, "epoch_mismatch")
    await jobs.server.fetch("DELETE", "/v1/stream/c", {"If-Match": f'"{epoch}"'})
    assert [await jobs.status(job_id) for job_id in (first, second)] == [404, 200]
    await jobs.server.fetch("DELETE", "/v1/stream/c")
    assert await jobs.status(second) == 404


async def test_a_submission_whose_job_is_deleted_meanwhile_says_so(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = jobs.server.app[CONTEXT].jobs
    start = registry._start

    def start_and_delete(job: Job, *rest: Any) -> None:
        start(job, *rest)
        jobs.server.manager.evict_and_cancel(job.key)

    monkeypatch.setattr(registry, "_start", start_and_delete)
    response = await jobs.post({"Idempotency-Key": "k"})
    assert (response.status, response.error["reason"]) == (400, "cancelled")
    assert len(registry) == len(registry._repeats) == 0


# --- limits of time


async def test_a_job_that_runs_for_too_long_is_stopped(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    async with jobs_on(upstream) as jobs:
        job, _ = await jobs.finish(await jobs.submit(max_runtime_s=0.1))
        assert (job["status"], job["reason"]) == ("cancelled", "max_runtime")
        assert job["completed_at"] - job["started_at"] >= 0.099


async def test_the_time_in_the_queue_is_not_run_time(upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, go_on, chunk(DONE), b"0\r\n\r\n"), stream(token("t"), DONE))
    async with jobs_on(upstream) as jobs:
        await jobs.submit()
        job_id = await jobs.submit(max_runtime_s=0.2)
        await asyncio.sleep(0.3)
        go_on.set()
        job, _ = await jobs.finish(job_id)
        assert job["status"] == "done"


@pytest.mark.parametrize("by_default", [False, True])
async def test_a_job_that_nobody_reads_is_abandoned(
    upstream: FakeUpstream, by_default: bool
) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    settings = {"abandon_after_s": 0.2} if by_default else {}
    async with jobs_on(upstream, **settings) as jobs:
        running = await jobs.submit(**({} if by_default else {"abandon_after_s": 0.2}))
        await jobs.until_status(running, "cancelled")
        job, _ = await jobs.finish(running)
        assert job["reason"] == "abandoned"
        assert 0.19 <= job["completed_at"] - job["created_at"] < 5


async def test_a_waiting_job_is_abandoned_too(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, STALL))
    async with jobs_on(upstream) as jobs:
        await jobs.submit()
        waiting = await jobs.submit(abandon_after_s=0.1)
        await jobs.until_status(waiting, "cancelled")
        assert (await jobs.finish(waiting))[0]["started_at"] is None


async def test_a_reader_that_comes_back_in_time_keeps_it_alive(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    async with jobs_on(upstream) as jobs:
        job_id = await jobs.submit(abandon_after_s=0.4)
        for _ in range(4):
            reader = await jobs.open(job_id)
            await asyncio.sleep(0.15)
            reader.connection.reset()
            await asyncio.sleep(0.15)
        assert (await jobs.describe(job_id))["status"] == "running"
        left = asyncio.get_running_loop().time()
        await jobs.until_status(job_id, "cancelled")
        assert asyncio.get_running_loop().time() - left < 0.4
        assert (await jobs.finish(job_id))[0]["reason"] == "abandoned"


async def test_any_session_is_abandoned_by_the_servers_default(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    async with jobs_on(upstream, abandon_after_s=0.2) as jobs:
        response = await jobs.server.post("c")
        await response.read_until(b"data:")
        await asyncio.sleep(0.4)
        session = jobs.server.session("c")
        assert session.is_live
        response.connection.reset()
        await until(lambda: not session.is_live)
        assert (session.state, session.snapshot().reason) == ("cancelled", "abandoned")


# --- the server's own endings


async def test_at_shutdown_every_job_says_so(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    logs: list[Response] = []
    described = []
    async with jobs_on(upstream) as jobs:
        for seen in (b"event: token", b"event: job_queued"):
            job_id = await jobs.submit()
            logs.append(await jobs.open(job_id))
            await logs[-1].read_until(seen)
            registry = jobs.server.app[CONTEXT].jobs
            described.append(registry.get(job_id, ""))
        reading = asyncio.gather(*[log.read_to_end() for log in logs])
        await jobs.server.runner.shutdown()
        for log, whole, (job, session) in zip(logs, await reading, described, strict=True):
            check_job(whole, job.describe(session))
            assert (log.end, session.snapshot().reason) == ("clean", "shutdown")


async def test_while_it_drains_it_takes_no_job_and_finishes_those_it_has(
    upstream: FakeUpstream,
) -> None:
    go_on = asyncio.Event()
    script = (SSE_HEAD, go_on, chunk(token("t") + DONE), b"0\r\n\r\n")
    upstream.play(script)
    async with jobs_on(upstream) as jobs:
        running, waiting = [await jobs.submit() for _ in range(2)]
        draining = asyncio.create_task(drain(jobs.server.app, 10))
        await until(lambda: jobs.server.app[CONTEXT].draining)
        refused = await jobs.post()
        assert (refused.status, refused.error["reason"]) == (503, "shutdown")
        assert refused.headers["retry-after"] == "1"
        go_on.set()
        await draining
        for job_id in (running, waiting):
            assert (await jobs.finish(job_id))[0]["status"] == "done"


async def test_a_fault_of_ours_ends_the_job_as_well(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Translator, "_take_choice", fail)
    job, _ = await jobs.finish(await jobs.submit())
    assert (job["status"], job["reason"]) == ("error", "internal_error")
    assert "a bug" not in str(job)
    caplog.clear()


async def test_a_job_that_memory_has_no_room_for_fails(upstream: FakeUpstream) -> None:
    size = 256 * 1024
    upstream.play((SSE_HEAD, chunk(token("x" * (size // 4))), STALL))
    async with jobs_on(upstream, max_session_bytes=size, max_total_bytes=size, slots=9) as jobs:
        registry = jobs.server.app[CONTEXT].jobs
        failed = None
        while failed is None:
            job, log = registry.get(await jobs.submit(), "")
            await until(lambda job=job, log=log: job.metrics.tokens == 1 or not log.is_live)
            failed = (job, log) if log.state == "failed" else None
        described = failed[0].describe(failed[1])
        check_description(described)
        assert (described["status"], described["reason"]) == ("error", "memory_budget")
        kept = b"".join([block async for block in failed[1].read_from("earliest")])
        told = told_in(kept, failed[1].dropped_prefix)
        assert told[-1].name == "job_error"


async def test_a_job_is_refused_where_there_is_no_room_for_its_log(upstream: FakeUpstream) -> None:
    upstream.play((STALL,))
    async with jobs_on(upstream, max_session_bytes=65536, max_total_bytes=65536) as jobs:
        taken = 0
        while (response := await jobs.post()).status == 202:
            taken += 1
        assert (response.status, response.error["reason"]) == (503, "memory_budget")
        assert len(jobs.server.app[CONTEXT].jobs) == taken
