"""``POST /infer``: a job as plain text, a token a line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from fake_upstream import DONE, RESET, SSE_HEAD, STALL, FakeUpstream, answer, chunk, stream, token
from jobs import Jobs, jobs_on
from serving import Response

from pyserve.app import CONTEXT


@pytest.fixture
async def jobs(upstream: FakeUpstream) -> AsyncIterator[Jobs]:
    upstream.play(stream(token("one"), token(" two"), DONE))
    async with jobs_on(upstream) as jobs:
        yield jobs


async def infer(jobs: Jobs, **fields: Any) -> Response:
    return await jobs.server.fetch("POST", "/infer", json={"prompt": "p"} | fields)


async def test_each_token_is_a_line(jobs: Jobs, upstream: FakeUpstream) -> None:
    response = await infer(jobs, model="m", max_tokens=7)
    assert (response.status, bytes(response.body)) == (200, b"one\n two\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.end == "clean"
    asked = orjson.loads(upstream.exchanges[0].body)
    assert (upstream.exchanges[0].target, asked["prompt"]) == ("/v1/completions", "p")
    assert asked["max_tokens"] == 7
    job = await jobs.describe(response.headers["x-job-id"])
    assert (job["status"], job["output"]["text"]) == ("done", "one two")


async def test_a_tokens_own_line_ends_are_escaped(jobs: Jobs, upstream: FakeUpstream) -> None:
    tokens = ["a\nb", "\r\n", "\\n", "\\error x", "é\u2028"]
    upstream.play(stream(*map(token, tokens), DONE))
    lines = (await infer(jobs)).body.decode().split("\n")
    assert lines.pop() == ""
    assert lines == ["a\\nb", "\\r\\n", "\\\\n", "\\\\error x", "é\u2028"]
    unescaped = [line.encode().decode("unicode_escape") for line in lines[:4]]
    assert unescaped == tokens[:4]


async def test_a_token_is_there_as_soon_as_it_is_told(jobs: Jobs, upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), b"0\r\n\r\n"))
    response = await jobs.server.open("POST", "/infer", json={"prompt": "p"})
    assert await response.read_until(b"a\n") == b"a\n"
    go_on.set()
    assert await response.read_to_end() == b"a\nb\n"


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (answer(500, {"error": {"message": "no"}}), 500, "upstream_error"),
        ((SSE_HEAD, RESET), 502, "upstream_lost"),
        (b"", 502, "upstream_lost"),
    ],
)
async def test_an_error_before_the_first_token_has_its_own_status(
    jobs: Jobs, upstream: FakeUpstream, script: Any, status: int, reason: str
) -> None:
    upstream.play(script)
    response = await infer(jobs)
    assert (response.status, response.error["reason"]) == (status, reason)


async def test_a_later_error_is_the_last_line(jobs: Jobs, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), RESET))
    response = await infer(jobs)
    assert (response.status, bytes(response.body)) == (200, b"a\n\\error upstream_lost\n")
    assert response.end == "clean"


async def test_a_stop_is_told_as_well(jobs: Jobs, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    response = await jobs.server.open("POST", "/infer", json={"prompt": "p"})
    await response.read_until(b"a\n")
    await jobs.cancel(response.headers["x-job-id"])
    assert (await response.read_to_end()).endswith(b"\n\\error cancelled\n")


async def test_no_token_at_all_is_an_empty_answer(jobs: Jobs, upstream: FakeUpstream) -> None:
    upstream.play(stream(DONE))
    response = await infer(jobs)
    assert (response.status, bytes(response.body), response.end) == (200, b"", "clean")


@pytest.mark.parametrize(
    "script", [(STALL,), (SSE_HEAD, STALL), (SSE_HEAD, chunk(token("a")), STALL)]
)
async def test_a_client_that_leaves_cancels(
    jobs: Jobs, upstream: FakeUpstream, script: Any
) -> None:
    upstream.play(script)
    connection = await jobs.server.connect()
    body = b'{"prompt": "p"}'
    await connection.send(
        b"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    exchange = await upstream.exchange()
    connection.reset()
    await exchange.wait_closed()
    (job_id,) = jobs.server.app[CONTEXT].jobs._jobs
    job, _ = await jobs.finish(job_id)
    assert job["status"] == "cancelled"


async def test_a_client_that_leaves_the_queue_is_not_generated_for(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, STALL))
    await jobs.submit()
    connection = await jobs.server.connect()
    body = b'{"prompt": "p"}'
    await connection.send(
        b"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    registry = jobs.server.app[CONTEXT].jobs
    async with asyncio.timeout(10):
        while len(registry) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    job_id = list(registry._jobs)[1]
    connection.reset()
    assert (await jobs.finish(job_id))[0]["status"] == "cancelled"
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"model": 1}, "model"),
        ({"temperature": 1}, "temperature"),
    ],
)
async def test_what_it_cannot_do_is_named(jobs: Jobs, fields: dict[str, Any], param: str) -> None:
    response = await infer(jobs, **fields)
    assert (response.status, response.error["param"]) == (400, param)
