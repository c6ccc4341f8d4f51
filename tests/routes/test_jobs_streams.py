"""Streams of many jobs: one log that a page reads, whatever its jobs do."""

from __future__ import annotations

import asyncio

import pytest
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from jobs import Jobs, Told, check_events, jobs_on, told_in
from serving import until

from pyserve.app import CONTEXT


async def create(jobs: Jobs) -> str:
    response = await jobs.server.fetch("POST", "/v1/streams")
    assert response.status == 201
    told = response.json()
    assert told == {
        "stream_id": told["stream_id"],
        "stream_url": f"/v1/stream?stream_id={told['stream_id']}",
    }
    stream_id: str = told["stream_id"]
    return stream_id


def of_job(told: list[Told], job_id: str) -> list[Told]:
    return [event for event in told if event.data["job_id"] == job_id]


async def test_one_stream_tells_every_jobs_whole_story(upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), token("b"), DONE), stream(token("c")), (SSE_HEAD, STALL))
    async with jobs_on(upstream, slots=2) as jobs:
        stream_id = await create(jobs)
        reader = await jobs.server.open("GET", f"/v1/stream?stream_id={stream_id}")
        ids = [await jobs.submit(stream_id=stream_id) for _ in range(3)]
        await reader.read_until(b"job_complete")
        waiting = await jobs.submit(stream_id=stream_id)
        for job_id in (ids[2], waiting):
            await jobs.cancel(job_id)
        finished = {job_id: await jobs.finish(job_id) for job_id in [*ids, waiting]}
        await until(lambda: jobs.server.manager.newest(stream_id) is not None)
        while bytes(reader.body).count(b'"metrics"') < 4:
            await reader.read_more()
        log = bytes(reader.body)
        told = told_in(log[: log.rindex(b"\n\n") + 2])
        for job_id, (job, own) in finished.items():
            assert of_job(told, job_id) == own
            check_events(of_job(told, job_id), job)
        assert reader.end is None


async def test_a_reader_resumes_it_like_any_other(upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    async with jobs_on(upstream) as jobs:
        stream_id = await create(jobs)
        target = f"/v1/stream?stream_id={stream_id}"
        first = await jobs.submit(stream_id=stream_id)
        reader = await jobs.server.open("GET", target)
        await reader.read_until(b"job_complete")
        log = bytes(reader.body)
        epoch = reader.headers["x-stream-epoch"]
        reader.connection.reset()
        await jobs.finish(first)
        second = await jobs.submit(stream_id=stream_id)
        position = f"{epoch}-{len(log)}"
        again = await jobs.server.open("GET", f"{target}&from={position}")
        rest = await again.read_until(second.encode())
        await again.read_until(b"job_complete")
        whole = await jobs.server.open("GET", target)
        assert (await whole.read_until(second.encode())).startswith(log)
        assert rest.count(first.encode()) <= 1
        assert len(jobs.server.manager) == 3


async def test_a_delete_ends_the_stream_and_not_its_jobs(upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), b"0\r\n\r\n"))
    async with jobs_on(upstream) as jobs:
        stream_id = await create(jobs)
        target = f"/v1/stream?stream_id={stream_id}"
        job_id = await jobs.submit(stream_id=stream_id)
        reader = await jobs.server.open("GET", target)
        await reader.read_until(b'"a"}')
        assert (await jobs.server.fetch("DELETE", target)).status == 204
        assert (await reader.read_to_end()).endswith(b"\n: end cancelled\n")
        assert reader.end == "clean"
        assert (await jobs.server.fetch("GET", target)).status == 404
        assert (await jobs.post(stream_id=stream_id)).error["reason"] == "stream_not_found"
        go_on.set()
        job, _ = await jobs.finish(job_id)
        assert job["output"]["text"] == "ab"


async def test_a_job_too_large_for_the_stream_fails_alone(upstream: FakeUpstream) -> None:
    huge = stream(token("x" * 5000))
    upstream.play((SSE_HEAD, chunk(token("a")), STALL), huge, stream(token("c"), DONE))
    async with jobs_on(upstream, slots=3, max_session_bytes=4096) as jobs:
        stream_id = await create(jobs)
        reader = await jobs.server.open("GET", f"/v1/stream?stream_id={stream_id}")
        first, large, last = [await jobs.submit(stream_id=stream_id) for _ in range(3)]
        assert (await jobs.finish(large))[0]["reason"] == "event_too_large"
        assert (await jobs.finish(last))[0]["status"] == "done"
        assert (await jobs.describe(first))["status"] == "running"
        await reader.read_until(b"job_error")
        await reader.read_until(b"job_complete")
        assert reader.end is None


async def test_a_reader_of_the_stream_reads_its_jobs(upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, STALL))
    async with jobs_on(upstream) as jobs:
        stream_id = await create(jobs)
        reader = await jobs.server.open("GET", f"/v1/stream?stream_id={stream_id}")
        job_id = await jobs.submit(stream_id=stream_id, abandon_after_s=0.2)
        await asyncio.sleep(0.4)
        assert (await jobs.describe(job_id))["status"] == "running"
        reader.connection.reset()
        await jobs.until_status(job_id, "cancelled")
        assert (await jobs.describe(job_id))["reason"] == "abandoned"


async def test_an_idle_stream_goes_after_its_ttl(upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, go_on, chunk(token("t") + DONE), b"0\r\n\r\n"))
    async with jobs_on(upstream, session_ttl_s=0.3) as jobs:
        streams = jobs.server.app[CONTEXT].jobs.streams
        read, written, idle = [await create(jobs) for _ in range(3)]
        reader = await jobs.server.open("GET", f"/v1/stream?stream_id={read}")
        await jobs.submit(stream_id=written)
        await until(lambda: len(streams) == 2)
        assert (await jobs.server.fetch("GET", f"/v1/stream?stream_id={idle}")).status == 404
        await asyncio.sleep(0.5)
        assert len(streams) == 2
        reader.connection.reset()
        go_on.set()
        await until(lambda: len(streams) == 0)
        await until(lambda: len(jobs.server.manager) == 0)


@pytest.mark.parametrize("seen", [b"event: token", b"event: job_queued"])
async def test_at_shutdown_its_jobs_end_before_it_does(upstream: FakeUpstream, seen: bytes) -> None:
    upstream.play((SSE_HEAD, chunk(token("t")), STALL))
    async with jobs_on(upstream) as jobs:
        stream_id = await create(jobs)
        reader = await jobs.server.open("GET", f"/v1/stream?stream_id={stream_id}")
        await jobs.submit(stream_id=stream_id)
        await reader.read_until(seen)
        reading = asyncio.create_task(reader.read_to_end())
        await jobs.server.runner.shutdown()
        log = await reading
        assert (reader.end, log.endswith(b"\n: end failed shutdown\n")) == ("clean", True)
        names = [event.name for event in told_in(log)]
        assert names[-2:] == ["job_error", "stream_error"]
