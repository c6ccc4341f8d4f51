"""Thousands of jobs through a queue that holds a tenth of them: nothing lost, nothing left."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter, defaultdict

import aiohttp
from fake_upstream import DONE, FakeUpstream, stream, token
from jobs import ENDINGS, Told, finish, told_in, usage
from serving import Server, serving, until

import pyserve
from pyserve.app import CONTEXT
from pyserve.jobs.job import Job, JobLog
from pyserve.producers.generation import Generation

JOBS, QUEUE = (10_000, 1_000) if os.environ.get("PYSERVE_SOAK") else (400, 40)
SLOTS = 8
CLIENTS = 16


async def submit_all(http: aiohttp.ClientSession, url: str, stream_id: str) -> Counter[int]:
    """Post them all, each again and again while the queue is full; counts the statuses."""
    statuses: Counter[int] = Counter()
    left = iter(range(JOBS))

    async def client() -> None:
        for number in left:
            status = 0
            while status != 202:
                body = {"prompt": f"{number}", "stream_id": stream_id}
                async with http.post(f"{url}/v1/jobs", json=body) as answer:
                    await answer.read()
                    status = answer.status
                statuses[status] += 1
                assert status in (202, 429)
                if status == 429:
                    assert int(answer.headers["Retry-After"]) >= 1
                    await asyncio.sleep(0.05)

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    return statuses


def count_of(*kinds: type) -> dict[str, int]:
    """How many objects of these there are."""
    gc.collect()
    found = Counter(type(item) for item in gc.get_objects())
    return {kind.__name__: found[kind] for kind in kinds}


def check_stories(told: list[Told]) -> None:
    """Every job has one ending, at its end."""
    stories: dict[str, list[str]] = defaultdict(list)
    for event in told:
        stories[event.data["job_id"]].append(event.name)
    assert len(stories) == JOBS
    last = {name for name, _ in ENDINGS.values()}
    for names in stories.values():
        assert [name for name in names if name in last] == ["job_complete"] == names[-1:]
        assert names.count("job_started") == 1


async def read_stories(server: Server, stream_id: str) -> list[Told]:
    response = await server.open("GET", f"/v1/stream?stream_id={stream_id}")
    seen = looked_up_to = 0
    while seen < JOBS:
        at = response.body.find(b"\nevent: job_complete\n", looked_up_to)
        if at < 0:
            await response.read_more()
        else:
            seen, looked_up_to = seen + 1, at + 1
    while response.body.find(b"\n\n", looked_up_to) < 0:
        await response.read_more()
    response.connection.close()
    log = bytes(response.body)
    return told_in(log[: log.rindex(b"\n\n") + 2])


async def test_every_job_ends_once_and_leaves_nothing_behind(upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), token("b"), finish("stop"), usage(1, 2), DONE))
    model = pyserve.ModelConfig("m", upstream=upstream.url, slots=SLOTS)
    settings = {"max_queue": QUEUE, "max_waiting_per_owner": 0, "session_ttl_s": 1.0}
    kinds = (Job, JobLog, Generation, pyserve.StreamSession)
    async with serving(models=[model], **settings) as server:
        context = server.app[CONTEXT]
        before = count_of(*kinds)
        made = await server.fetch("POST", "/v1/streams")
        stream_id = made.json()["stream_id"]
        async with aiohttp.ClientSession() as http:
            statuses = await submit_all(http, server.url, stream_id)
        assert statuses[202] == JOBS
        assert statuses[429] > 0
        check_stories(await read_stories(server, stream_id))
        await server.fetch("DELETE", f"/v1/stream?stream_id={stream_id}")
        upstream.exchanges.clear()
        await until(lambda: len(server.manager) == len(context.jobs) == 0)
        assert context.scheduler.waiting == 0
        assert not context.jobs._ended
        await until(lambda: server.manager.used_bytes == 0)  # the reader's leaving is noticed
        assert count_of(*kinds) == before
