"""Jobs on a real llama.cpp: watched, reloaded, stopped, repeated, and bereft of their model."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jobs import ENDINGS, Told, check_job, told_in
from llama import LONG, SLOTS, chat, llama_command, wait_busy_slots
from process import Server, environment, pyserve

PATIENCE_S = 30.0


class Jobs:
    """A client of a pyserve that runs somewhere."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    async def post(
        self, max_tokens: int = 20, key: str = "", seed: int = 1, **fields: Any
    ) -> tuple[int, dict[str, Any]]:
        asked = chat(max_tokens, seed=seed)
        del asked["stream"]
        body = {"messages": asked.pop("messages"), "params": asked} | fields
        headers = {"Idempotency-Key": key} if key else {}
        async with self.http.post(f"{self.url}/v1/jobs", json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def submit(self, max_tokens: int = 20, **fields: Any) -> str:
        status, told = await self.post(max_tokens, **fields)
        assert status == 202, told
        job_id: str = told["job_id"]
        return job_id

    async def describe(self, job_id: str) -> dict[str, Any]:
        async with self.http.get(f"{self.url}/v1/jobs/{job_id}") as answer:
            assert answer.status == 200
            told: dict[str, Any] = await answer.json()
            return told

    async def cancel(self, job_id: str) -> dict[str, Any]:
        async with self.http.post(f"{self.url}/v1/jobs/{job_id}/cancel") as answer:
            assert answer.status == 200
            told: dict[str, Any] = await answer.json()
            return told

    @asynccontextmanager
    async def read(self, job_id: str, **query: str) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self.http.get(
            f"{self.url}/v1/stream", params={"job_id": job_id} | query
        ) as answer:
            assert answer.status == 200
            yield answer

    async def wait_for(self, job_id: str, event: bytes) -> None:
        """Until the job's stream tells this."""
        async with asyncio.timeout(PATIENCE_S), self.read(job_id) as answer:
            await answer.content.readuntil(b"event: " + event + b"\n")

    async def finish(self, job_id: str) -> tuple[dict[str, Any], list[Told]]:
        """The job and its events when it is over, held against each other."""
        async with asyncio.timeout(PATIENCE_S), self.read(job_id) as answer:
            log = await answer.read()
        job = await self.describe(job_id)
        return job, check_job(log, job)


@pytest.fixture
async def jobs(served_llama: Server, http: aiohttp.ClientSession) -> Jobs:
    return Jobs(http, served_llama.url)


async def test_two_readers_and_one_that_reloads_see_one_answer(jobs: Jobs) -> None:
    job_id = await jobs.submit(300)
    async with jobs.read(job_id) as one, jobs.read(job_id) as other:
        part = b""
        while part.count(b"event: token") < 50:
            part += await one.content.readuntil(b"\n\n")
        position = part.split(b"id: ")[-1].strip().decode()
        async with jobs.read(job_id, **{"from": position}) as again:
            rest = await again.read()
        whole = await other.read()
    assert part + rest == whole
    told = check_job(whole, await jobs.describe(job_id))
    assert [event.name for event in told[:3]] == ["job_queued", "job_started", "token"]


async def test_a_jobs_answer_is_the_models_and_its_figures_are_llamas(
    jobs: Jobs, http: aiohttp.ClientSession
) -> None:
    job, told = await jobs.finish(await jobs.submit(200))
    async with http.post(f"{jobs.url}/v1/chat/completions", json=chat(200, stream=False)) as answer:
        proxied = await answer.json()
    assert job["output"]["text"] == proxied["choices"][0]["message"]["content"]
    assert (job["status"], job["reason"]) == ("done", "length")
    assert job["usage"]["completion_tokens"] == 200
    assert job["usage"]["prompt_tokens"] == proxied["usage"]["prompt_tokens"]
    assert 190 <= job["metrics"]["tokens"] <= 200
    (usage,) = [event.data for event in told if event.name == "usage"]
    assert usage["usage"] == job["usage"]
    # What llama.cpp measured and what we did are about the same answer.
    measured = job["metrics"]["tokens_per_second"]
    assert measured == pytest.approx(usage["timings"]["predicted_per_second"], rel=0.9)


async def test_a_prompt_is_completed(jobs: Jobs) -> None:
    body = {"prompt": "bado kele", "params": {"max_tokens": 12}}
    async with jobs.http.post(f"{jobs.url}/v1/jobs", json=body) as answer:
        job_id = (await answer.json())["job_id"]
    job, _ = await jobs.finish(job_id)
    assert (job["reason"], job["usage"]["completion_tokens"]) == ("length", 12)
    assert job["output"]["text"]


async def test_infer_answers_a_token_a_line(jobs: Jobs) -> None:
    body = {"prompt": "bado kele", "max_tokens": 12}
    async with jobs.http.post(f"{jobs.url}/infer", json=body) as answer:
        assert answer.content_type == "text/plain"
        lines = (await answer.text()).splitlines()
        job = await jobs.describe(answer.headers["X-Job-Id"])
    assert "".join(lines) == job["output"]["text"]
    assert len(lines) == job["metrics"]["tokens"]


async def test_who_leaves_an_inference_frees_its_slot(jobs: Jobs, llama: Server) -> None:
    body = {"prompt": "bado kele", "max_tokens": LONG}
    async with jobs.http.post(f"{jobs.url}/infer", json=body) as answer:
        await answer.content.readline()
        await wait_busy_slots(jobs.http, llama.url, 1)
    await wait_busy_slots(jobs.http, llama.url, 0)


async def test_a_job_is_cancelled_in_every_state(jobs: Jobs, llama: Server) -> None:
    running = [await jobs.submit(LONG) for _ in range(SLOTS)]
    waiting = [await jobs.submit(LONG) for _ in range(2)]
    assert [(await jobs.describe(job_id))["queue_position"] for job_id in waiting] == [1, 2]
    await jobs.wait_for(running[0], b"token")
    await jobs.cancel(waiting[0])
    job, told = await jobs.finish(waiting[0])
    assert [event.name for event in told][-1] == "job_cancelled"
    assert job["started_at"] is None
    async with jobs.read(waiting[1]) as answer:
        await answer.content.readuntil(b'"queue_position":1}')
    await jobs.cancel(running[0])
    await jobs.wait_for(waiting[1], b"token")  # it has the slot
    for job_id in [*running, waiting[1]]:
        cancelled = await jobs.cancel(job_id)
        assert await jobs.cancel(job_id) == cancelled
        assert (await jobs.finish(job_id))[0]["status"] == "cancelled"
    await wait_busy_slots(jobs.http, llama.url, 0)
    assert (await jobs.finish(await jobs.submit()))[0]["status"] == "done"


async def test_a_key_makes_one_job_and_only_of_one_body(jobs: Jobs) -> None:
    first, again = [await jobs.post(key="once") for _ in range(2)]
    assert (first[0], again[0]) == (202, 200)
    assert first[1]["job_id"] == again[1]["job_id"]
    status, refused = await jobs.post(key="once", seed=2)
    assert (status, refused["error"]["reason"]) == (422, "idempotency_mismatch")
    await jobs.finish(first[1]["job_id"])


async def test_a_full_queue_says_when_to_come_back(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    with pyserve("--upstream", llama.url, "--max-queue", "1") as server:
        jobs = Jobs(http, server.url)
        taken = [await jobs.submit(LONG)]
        await jobs.wait_for(taken[0], b"job_started")  # the slots are known
        taken += [await jobs.submit(LONG) for _ in range(SLOTS)]
        async with http.post(f"{server.url}/v1/jobs", json={"prompt": "p"}) as answer:
            assert (answer.status, int(answer.headers["Retry-After"]) >= 1) == (429, True)
            assert (await answer.json())["error"]["reason"] == "queue_full"
        for job_id in reversed(taken):
            await jobs.cancel(job_id)
        await wait_busy_slots(http, llama.url, 0)


@contextmanager
def own_llama(tiny_model: Path) -> Iterator[tuple[Server, Server]]:
    """A llama.cpp to be killed, with a pyserve in front of it."""
    options = ("--unhealthy-wait", "0.5", "--health-interval", "0.5")
    with (
        Server(llama_command(tiny_model), environment()) as llama,
        pyserve("--upstream", llama.url, *options) as server,
    ):
        yield llama, server


async def test_a_model_that_is_killed_ends_every_job_once(
    tiny_model: Path, http: aiohttp.ClientSession
) -> None:
    with own_llama(tiny_model) as (llama, server):
        jobs = Jobs(http, server.url)
        long_prompt = [{"role": "user", "content": "bado kele " * 2000}]
        speaking = await jobs.submit(LONG)
        reading = await jobs.submit(5, messages=long_prompt)
        others = [await jobs.submit(LONG) for _ in range(SLOTS - 2)]
        waiting = await jobs.submit()
        await jobs.wait_for(speaking, b"token")
        await jobs.wait_for(waiting, b"job_queued")
        llama.send(signal.SIGKILL)
        for job_id in (speaking, reading, *others, waiting):
            job, _ = await jobs.finish(job_id)
            assert job["status"] == "error", job
            assert job["reason"] in ("upstream_lost", "upstream_unreachable", "model_unhealthy")
        async with http.post(f"{server.url}/v1/jobs", json={"prompt": "p"}) as answer:
            assert answer.status in (202, 503)


async def test_at_a_stop_signal_jobs_end_in_their_words(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    with pyserve("--upstream", llama.url, "--drain-timeout", "0.2") as server:
        jobs = Jobs(http, server.url)
        taken = [await jobs.submit(LONG) for _ in range(SLOTS + 1)]
        await jobs.wait_for(taken[0], b"token")
        async with jobs.read(taken[0]) as running, jobs.read(taken[-1]) as waiting:
            server.send(signal.SIGTERM)
            logs = [await answer.read() for answer in (running, waiting)]
        for log in logs:
            last = told_in(log)[-1]
            assert (last.name, last.data["reason"]) == (ENDINGS["error"][0], "shutdown")
            assert log.endswith(b"\n: end failed shutdown\n")
        assert server.wait() == 0
    await wait_busy_slots(http, llama.url, 0)
