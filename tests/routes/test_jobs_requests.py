"""What a submission may say, what it is refused for, and what a repeated one gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, stream, token
from jobs import Jobs, jobs_on

from pyserve.app import CONTEXT

KEY = {"Idempotency-Key": "k"}


@pytest.fixture
async def jobs(upstream: FakeUpstream) -> AsyncIterator[Jobs]:
    upstream.play(stream(token("t"), DONE))
    async with jobs_on(upstream, max_queue=2) as jobs:
        yield jobs


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({}, "invalid_body", None),
    ({"prompt": "p", "messages": [{}]}, "invalid_body", None),
    ({"prompt": None}, "invalid_body", None),
    ({"prompt": 1}, "invalid_parameter", "prompt"),
    ({"prompt": ["p"]}, "invalid_parameter", "prompt"),
    ({"messages": []}, "invalid_parameter", "messages"),
    ({"messages": "hi"}, "invalid_parameter", "messages"),
    ({"messages": ["hi"]}, "invalid_parameter", "messages"),
    ({"prompt": "p", "mesages": 1}, "invalid_parameter", "mesages"),
    ({"prompt": "p", "model": 1}, "invalid_parameter", "model"),
    ({"prompt": "p", "model": ""}, "invalid_parameter", "model"),
    ({"prompt": "p", "priority": "urgent"}, "invalid_parameter", "priority"),
    ({"prompt": "p", "priority": "HIGH"}, "invalid_parameter", "priority"),
    ({"prompt": "p", "priority": 1}, "invalid_parameter", "priority"),
    ({"prompt": "p", "params": []}, "invalid_parameter", "params"),
    ({"prompt": "p", "params": {"stream": False}}, "invalid_parameter", "params.stream"),
    ({"prompt": "p", "params": {"model": "x"}}, "invalid_parameter", "params.model"),
    ({"prompt": "p", "params": {"messages": []}}, "invalid_parameter", "params.messages"),
    ({"prompt": "p", "params": {"n": 2}}, "invalid_parameter", "params.n"),
    (
        {"prompt": "p", "params": {"stream_options": 1}},
        "invalid_parameter",
        "params.stream_options",
    ),
    ({"prompt": "p", "abandon_after_s": 0}, "invalid_parameter", "abandon_after_s"),
    ({"prompt": "p", "abandon_after_s": "1"}, "invalid_parameter", "abandon_after_s"),
    ({"prompt": "p", "max_runtime_s": True}, "invalid_parameter", "max_runtime_s"),
    ({"prompt": "p", "max_runtime_s": -1}, "invalid_parameter", "max_runtime_s"),
    ({"prompt": "p", "stream_id": ""}, "invalid_parameter", "stream_id"),
    ({"prompt": "p", "conversation_id": ""}, "invalid_conversation_id", "conversation_id"),
    ({"prompt": "p", "conversation_id": "a\x1fb"}, "invalid_conversation_id", "conversation_id"),
    ({"prompt": "p", "conversation_id": 7}, "invalid_conversation_id", "conversation_id"),
]


@pytest.mark.parametrize(("body", "reason", "param"), REFUSED, ids=lambda v: str(v)[:50])
async def test_what_a_job_cannot_be_is_named(
    jobs: Jobs, upstream: FakeUpstream, body: dict[str, Any], reason: str, param: str | None
) -> None:
    response = await jobs.server.fetch("POST", "/v1/jobs", json=body)
    assert (response.status, response.error["reason"]) == (400, reason)
    assert response.error.get("param") == param
    assert response.error["type"] == "invalid_request_error"
    assert len(jobs.server.app[CONTEXT].jobs) == 0
    assert upstream.exchanges == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": "\\ud800"}', b"\xff"])
async def test_a_body_that_is_no_object_is_refused(jobs: Jobs, body: bytes) -> None:
    response = await jobs.server.fetch("POST", "/v1/jobs", body=body)
    assert (response.status, response.error["reason"]) == (400, "invalid_body")


async def test_a_message_names_the_fields_there_are(jobs: Jobs) -> None:
    response = await jobs.post(prio="low")
    assert response.error["message"] == (
        "There is no such field; the fields are prompt, messages, model, conversation_id,"
        " stream_id, priority, params, abandon_after_s, max_runtime_s"
    )


async def test_a_null_is_as_good_as_nothing(jobs: Jobs) -> None:
    fields = ("messages", "model", "conversation_id", "stream_id", "priority", "params")
    await jobs.finish(await jobs.submit(prompt="p", **dict.fromkeys(fields)))


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"priority": "high"}, 403, "priority_too_high"),
        ({"stream_id": "stream_0"}, 404, "stream_not_found"),
    ],
)
async def test_what_the_server_refuses_leaves_no_job(
    jobs: Jobs, body: dict[str, Any], status: int, reason: str
) -> None:
    response = await jobs.post(KEY, **body)
    assert (response.status, response.error["reason"]) == (status, reason)
    assert len(jobs.server.app[CONTEXT].jobs) == 0
    assert len(jobs.server.manager) == 0
    # A start that failed frees its key.
    assert (await jobs.post(KEY)).status == 202


async def test_a_full_queue_refuses_with_a_time_to_come_back(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, STALL))
    taken = [await jobs.submit() for _ in range(3)]
    refused = await jobs.post(KEY)
    assert (refused.status, refused.error["reason"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    await jobs.cancel(taken[1])
    assert (await jobs.post(KEY)).status == 202


# --- idempotency


async def test_the_same_key_and_body_is_the_same_job(jobs: Jobs) -> None:
    first = await jobs.post(KEY)
    again = await jobs.post(KEY)
    assert (first.status, again.status) == (202, 200)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    names = ("job_id", "conversation_id", "stream_url")
    assert [first.json()[name] for name in names] == [again.json()[name] for name in names]
    job, _ = await jobs.finish(first.json()["job_id"])
    assert (await jobs.post(KEY)).json()["status"] == job["status"] == "done"


async def test_the_same_key_with_another_body_is_a_mismatch(jobs: Jobs) -> None:
    await jobs.post(KEY, prompt="one")
    response = await jobs.post(KEY, prompt="two")
    assert (response.status, response.error["reason"]) == (422, "idempotency_mismatch")


async def test_a_keys_scope_is_its_conversation(jobs: Jobs) -> None:
    made = [await jobs.post(KEY, conversation_id=name) for name in ("a", "b")]
    assert [response.status for response in made] == [202, 202]
    assert len({response.json()["job_id"] for response in made}) == 2


async def test_a_key_of_the_chat_route_is_another(jobs: Jobs) -> None:
    await jobs.post(KEY, conversation_id="c")
    await (await jobs.server.post("c", **KEY)).whole()
    assert (await jobs.post(KEY, conversation_id="c")).status == 200


async def test_repeats_that_come_together_make_one_job(jobs: Jobs, upstream: FakeUpstream) -> None:
    responses = await asyncio.gather(*[jobs.post(KEY) for _ in range(8)])
    assert sorted(response.status for response in responses) == [200] * 7 + [202]
    (job_id,) = {response.json()["job_id"] for response in responses}
    await jobs.finish(job_id)
    assert len(upstream.exchanges) == 1


async def test_a_key_goes_with_its_jobs_log(jobs: Jobs) -> None:
    first = (await jobs.post(KEY)).json()["job_id"]
    await jobs.server.fetch("DELETE", f"/v1/stream?job_id={first}")
    second = await jobs.post(KEY, prompt="another")
    assert (second.status, second.json()["job_id"] == first) == (202, False)


async def test_a_key_has_a_longest_length(jobs: Jobs) -> None:
    response = await jobs.post({"Idempotency-Key": "k" * 256})
    assert (response.status, response.error["reason"]) == (400, "invalid_parameter")


async def test_nothing_of_pyserves_reaches_the_upstream(jobs: Jobs, upstream: FakeUpstream) -> None:
    headers = KEY | {"Authorization": "Bearer mine", "Cookie": "a=b"}
    job_id = (await jobs.post(headers, conversation_id="secret")).json()["job_id"]
    await jobs.finish(job_id)
    exchange = upstream.exchanges[0]
    names = {"idempotency-key", "authorization", "cookie", "x-conversation-id"}
    assert names & exchange.headers.keys() == set()
    assert set(orjson.loads(exchange.body)) == {"model", "prompt", "stream", "stream_options"}
