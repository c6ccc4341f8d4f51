"""Jobs: what their submission answers, what their streams tell, what is known of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from jobs import Jobs, check_job, finish, jobs_on, usage
from serving import serving, until

import pyserve

ANSWER = stream(token("Hel"), token("lo"), finish("stop"), usage(3, 2), DONE)


@pytest.fixture
async def jobs(upstream: FakeUpstream) -> AsyncIterator[Jobs]:
    """One slot."""
    upstream.play(ANSWER)
    async with jobs_on(upstream) as jobs:
        yield jobs


async def test_a_job_is_taken_at_once_and_tells_where_to_read_it(jobs: Jobs) -> None:
    response = await jobs.post(conversation_id="c/é", model="m")
    assert response.status == 202
    told = response.json()
    job_id = told["job_id"]
    assert told == {
        "job_id": job_id,
        "conversation_id": "c/é",
        "status": "running",
        "queue_position": None,
        "stream_url": f"/v1/stream?job_id={job_id}",
    }
    stream = await jobs.server.fetch("GET", told["stream_url"])
    assert stream.status == 200
    assert stream.headers["x-conversation-id"] == "c/%C3%A9"


async def test_its_stream_tells_the_whole_story_and_the_job_agrees(jobs: Jobs) -> None:
    job, told = await jobs.finish(await jobs.submit())
    job_id = job["job_id"]
    assert [(event.name, event.data) for event in told[:-1]] == [
        ("job_queued", {"job_id": job_id, "queue_position": 1}),
        ("job_started", {"job_id": job_id, "model": "m"}),
        ("token", {"job_id": job_id, "token": "Hel"}),
        ("token", {"job_id": job_id, "token": "lo"}),
        ("usage", {"job_id": job_id, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}),
    ]
    assert (told[-1].name, job["status"], job["reason"]) == ("job_complete", "done", "stop")
    assert job["output"] == {"text": "Hello", "reasoning": "", "tool_calls": [], "truncated": False}
    assert (job["model"], job["metrics"]["tokens"]) == ("m", 2)
    assert job["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


async def test_messages_go_to_the_chat_route_and_a_prompt_to_completions(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    text = {"choices": [{"index": 0, "text": "as text", "finish_reason": "length"}]}
    upstream.play(stream(b"data: " + orjson.dumps(text) + b"\n\n", DONE), ANSWER)
    params = {"temperature": 0.5, "stream_options": {"x": 1}}
    first, _ = await jobs.finish(await jobs.submit(prompt="say", params=params))
    messages = [{"role": "user", "content": "say"}]
    await jobs.finish(await jobs.submit(messages=messages, model="m"))
    asked = [(exchange.target, orjson.loads(exchange.body)) for exchange in upstream.exchanges]
    options = {"include_usage": True}
    assert asked == [
        (
            "/v1/completions",
            {
                "prompt": "say",
                "temperature": 0.5,
                "model": "m",
                "stream": True,
                "stream_options": {"x": 1} | options,
            },
        ),
        (
            "/v1/chat/completions",
            {"messages": messages, "model": "m", "stream": True, "stream_options": options},
        ),
    ]
    assert (first["output"]["text"], first["reason"]) == ("as text", "length")


async def test_where_any_name_is_taken_a_job_has_the_one_it_asked_for(
    upstream: FakeUpstream,
) -> None:
    upstream.play(ANSWER)
    async with serving(upstream=upstream.url) as server:
        jobs = Jobs(server)
        named, _ = await jobs.finish(await jobs.submit(model="theirs"))
        unnamed, _ = await jobs.finish(await jobs.submit())
    assert (named["model"], unnamed["model"]) == ("theirs", "default")
    asked = [orjson.loads(exchange.body).get("model") for exchange in upstream.exchanges]
    assert asked == ["theirs", None]


async def test_a_models_own_defaults_are_below_a_jobs_params(upstream: FakeUpstream) -> None:
    upstream.play(ANSWER)
    params = {"temperature": 0.1, "top_p": 0.9}
    model = pyserve.ModelConfig("m", upstream=upstream.url, params=params, upstream_model="theirs")
    async with serving(models=[model]) as server:
        jobs = Jobs(server)
        await jobs.finish(await jobs.submit(params={"temperature": 1}))
    asked = orjson.loads(upstream.exchanges[0].body)
    assert (asked["temperature"], asked["top_p"], asked["model"]) == (1, 0.9, "theirs")


async def test_two_readers_follow_and_one_comes_back_where_it_was(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), go_on, chunk(token("b") + DONE), b"0\r\n\r\n"))
    job_id = await jobs.submit()
    readers = [await jobs.open(job_id) for _ in range(2)]
    for reader in readers:
        await reader.read_until(b'"a"}\nid: ')
        await reader.read_until(b"\n: ping")
    half = bytes(readers[0].body)
    last_id = half.decode().split("id: ")[-1].split("\n")[0]
    readers[0].connection.reset()
    go_on.set()
    rest = await (await jobs.open(job_id, Last_Event_ID=last_id)).whole()
    whole = await readers[1].read_to_end()
    offset = int(last_id.split("-")[1])
    assert whole[offset:] == rest.body
    check_job(whole, await jobs.describe(job_id))


async def test_a_reader_that_has_it_all_is_not_asked_back(jobs: Jobs) -> None:
    job_id = await jobs.submit()
    whole = await (await jobs.open(job_id)).read_to_end()
    last_id = whole.decode().split("id: ")[-1].split("\n")[0]
    assert (await jobs.open(job_id, Last_Event_ID=last_id)).status == 204
    lost = await jobs.server.fetch("GET", f"/v1/stream?job_id={job_id}&from=999999")
    assert (lost.status, lost.error["reason"]) == (400, "offset_ahead")


async def test_who_waits_hears_his_place_whenever_it_changes(
    jobs: Jobs, upstream: FakeUpstream
) -> None:
    go_on = [asyncio.Event() for _ in range(3)]
    upstream.play(*[(SSE_HEAD, event, chunk(token("t") + DONE), b"0\r\n\r\n") for event in go_on])
    first = await jobs.submit()
    responses = [await jobs.post() for _ in range(2)]
    assert [(r.json()["status"], r.json()["queue_position"]) for r in responses] == [
        ("queued", 1),
        ("queued", 2),
    ]
    last = responses[1].json()["job_id"]
    assert (await jobs.describe(last))["queue_position"] == 2
    reader = await jobs.open(last)
    await reader.read_until(b'"queue_position":2')
    go_on[0].set()
    await jobs.finish(first)
    await reader.read_until(b'"queue_position":1')
    assert (await jobs.describe(last))["status"] == "queued"
    go_on[1].set()
    go_on[2].set()
    job, told = await jobs.finish(last)
    places = [e.data["queue_position"] for e in told if e.name == "job_queued"]
    assert places == [2, 1]
    assert job["status"] == "done"
    assert job["metrics"]["queue_ms"] > 0


async def test_a_lookup_says_that_a_waiting_job_waits(jobs: Jobs, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, STALL))
    await jobs.submit(conversation_id="c")
    await jobs.submit(conversation_id="c")
    response = await jobs.server.fetch(
        "POST", "/v1/streams/lookup", json={"conversation_ids": ["c"]}
    )
    found = [(item["conversation_id"], item["state"]) for item in response.json()]
    assert found == [("c", "streaming"), ("c", "queued")]


async def test_a_conversation_finds_the_newest_of_its_session_and_its_jobs(jobs: Jobs) -> None:
    first = await jobs.submit(conversation_id="c")
    await jobs.finish(first)
    assert first.encode() in (await jobs.server.fetch("GET", "/v1/stream/c")).body
    await (await jobs.server.post("c")).whole()
    assert b"job_id" not in (await jobs.server.fetch("GET", "/v1/stream/c")).body
    second = await jobs.submit(conversation_id="c")
    await jobs.finish(second)
    newest = await jobs.server.fetch("GET", "/v1/stream?conv_id=c")
    assert second.encode() in newest.body
    # A POST replaces the conversation's session, never a job.
    await (await jobs.server.post("c")).whole()
    assert await jobs.status(first) == await jobs.status(second) == 200


@pytest.mark.parametrize("name", ["\x1f", "c\x1f0000000000000000"])
async def test_no_conversation_id_reaches_a_jobs_own_key(jobs: Jobs, name: str) -> None:
    await jobs.finish(await jobs.submit(conversation_id="c"))
    escaped = name.replace("\x1f", "%1f")
    response = await jobs.server.fetch("GET", f"/v1/stream/{escaped}")
    assert response.error["reason"] == "invalid_conversation_id"
    found = await jobs.server.fetch("POST", "/v1/streams/lookup", json={"conversation_ids": [name]})
    assert found.json() == []


async def test_a_stream_has_one_name(jobs: Jobs) -> None:
    job_id = await jobs.submit()
    for target in (f"/v1/stream/c?job_id={job_id}", f"/v1/stream?conv_id=c&job_id={job_id}"):
        response = await jobs.server.fetch("GET", target)
        assert (response.status, response.error["reason"]) == (400, "invalid_parameter")


async def test_another_owners_job_is_not_there(upstream: FakeUpstream) -> None:
    upstream.play(ANSWER)

    def authenticate(request: web.Request) -> str:
        return request.headers["X-Owner"]

    async with serving(upstream=upstream.url, authenticate=authenticate) as server:

        async def ask(owner: str, method: str, target: str, **keywords: Any) -> tuple[int, Any]:
            response = await server.fetch(method, target, {"X-Owner": owner}, **keywords)
            return response.status, response.body and response

        _, made = await ask("alice", "POST", "/v1/jobs", json={"prompt": "p"})
        job_id = made.json()["job_id"]
        reasons = []
        for method, target in (
            ("GET", f"/v1/jobs/{job_id}"),
            ("POST", f"/v1/jobs/{job_id}/cancel"),
            ("GET", f"/v1/stream?job_id={job_id}"),
        ):
            status, refused = await ask("bob", method, target)
            assert status == 404
            reasons.append(refused.error["reason"])
        assert reasons == ["job_not_found", "job_not_found", "stream_not_found"]
        assert (await ask("bob", "DELETE", f"/v1/stream?job_id={job_id}"))[0] == 204
        assert (await ask("alice", "GET", f"/v1/jobs/{job_id}"))[0] == 200


async def test_under_a_prefix_the_stream_is_below_it(upstream: FakeUpstream) -> None:
    upstream.play(ANSWER)
    app = web.Application()
    pyserve.setup(app, pyserve.Config(upstream=upstream.url, health_interval_s=0), prefix="/llm")
    async with serving(app) as server:
        jobs = Jobs(server, "/llm")
        told = (await jobs.post()).json()
        assert told["stream_url"] == f"/llm/v1/stream?job_id={told['job_id']}"
        made = await server.fetch("POST", "/llm/v1/streams")
        assert made.json()["stream_url"].startswith("/llm/v1/stream?stream_id=stream_")
        await jobs.finish(told["job_id"])


async def test_a_job_goes_with_its_log_when_the_ttl_is_over(upstream: FakeUpstream) -> None:
    upstream.play(ANSWER)
    async with jobs_on(upstream, session_ttl_s=0.1) as jobs:
        registry = jobs.server.app[pyserve.app.CONTEXT].jobs
        job_id = (await jobs.post({"Idempotency-Key": "k"})).json()["job_id"]
        await jobs.until_status(job_id, "done")
        await asyncio.sleep(0.1)
        assert await jobs.status(job_id) == 404
        again = await jobs.post({"Idempotency-Key": "k"})
        assert (again.status, again.json()["job_id"] == job_id) == (202, False)
        await _until_empty(registry)


async def _until_empty(registry: Any) -> None:
    await until(lambda: not (len(registry) or registry._ended or registry._repeats))
