"""What every job keeps to, whatever happens to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from fake_upstream import FakeUpstream
from serving import Event, Response, Server, events_of, serving, until

import pyserve
from pyserve.app import CONTEXT

#: A job's status, its last event, and the last line of its log.
ENDINGS = {
    "done": ("job_complete", "completed"),
    "cancelled": ("job_cancelled", "cancelled"),
    "error": ("job_error", "failed"),
}
_LAST = {last for last, _ in ENDINGS.values()}


@dataclass(frozen=True)
class Told:
    """One event of a job."""

    name: str
    data: dict[str, Any]


def told_in(log: bytes, start: int = 0) -> list[Told]:
    """The events of a log, each of which has a name."""
    events: list[Event] = events_of(log, start)
    assert all(event.name for event in events)
    return [Told(event.name, orjson.loads(event.data)) for event in events]


def check_events(told: list[Told], job: dict[str, Any]) -> None:
    """The whole story of a job that is over, as `job`, its description, has it."""
    names = [event.name for event in told]
    assert all(event.data["job_id"] == job["job_id"] for event in told)
    assert sum(name in _LAST for name in names) == 1, names
    last_name, _ = ENDINGS[job["status"]]
    assert names[-1] == last_name
    assert told[-1].data == {name: job[name] for name in ("job_id", "reason", "metrics")}
    queued = names.count("job_queued")
    assert names[:queued] == ["job_queued"] * queued
    started = names.count("job_started")
    assert started == (job["started_at"] is not None)
    assert names[queued : queued + started] == ["job_started"] * started
    assert started or queued + 1 == len(names)


def check_description(job: dict[str, Any]) -> None:
    """What is known of a job that is over agrees with itself."""
    assert job["queue_position"] is None
    assert (job["error"] is not None) == (job["status"] == "error")
    if job["error"] is not None:
        assert job["error"]["reason"] == job["reason"]
    times = [job[f"{what}_at"] for what in ("created", "started", "first_token", "completed")]
    known = [time for time in times if time is not None]
    assert known == sorted(known)
    metrics = job["metrics"]
    assert metrics["queue_ms"] >= 0
    assert (metrics["ttft_ms"] is not None) == (metrics["tokens"] > 0)
    assert (job["first_token_at"] is not None) == (metrics["tokens"] > 0)


def check_job(log: bytes, job: dict[str, Any]) -> list[Told]:
    """A log that was read from its start, and the description: one ending, and they agree."""
    told = told_in(log)
    check_description(job)
    check_events(told, job)
    state = ENDINGS[job["status"]][1]
    ending = f": end {state} {job['reason']}\n" if state == "failed" else f": end {state}\n"
    assert log.decode().endswith("\n\n" + ending)
    for output, event_name in (("text", "token"), ("reasoning", "reasoning")):
        pieces = [event.data["token"] for event in told if event.name == event_name]
        assert "".join(pieces) == job["output"][output]
    return told


class Jobs:
    """A client of one server's jobs."""

    def __init__(self, server: Server, prefix: str = "") -> None:
        self.server = server
        self.prefix = prefix

    async def post(self, headers: dict[str, str] | None = None, **fields: Any) -> Response:
        """The answer to a submission; its prompt is "p" unless it says what to ask."""
        if not {"prompt", "messages"} & fields.keys():
            fields["prompt"] = "p"
        return await self.server.fetch("POST", f"{self.prefix}/v1/jobs", headers or {}, json=fields)

    async def submit(self, **fields: Any) -> str:
        """The id of a job that was taken."""
        response = await self.post(**fields)
        assert response.status == 202, response.body
        job_id: str = response.json()["job_id"]
        return job_id

    async def describe(self, job_id: str) -> dict[str, Any]:
        """What is known of a job."""
        response = await self.server.fetch("GET", f"{self.prefix}/v1/jobs/{job_id}")
        assert response.status == 200, response.body
        described: dict[str, Any] = response.json()
        return described

    async def status(self, job_id: str) -> int:
        """The status of the answer about it."""
        return (await self.server.fetch("GET", f"{self.prefix}/v1/jobs/{job_id}")).status

    async def open(self, job_id: str, **headers: str) -> Response:
        """Its stream."""
        target = f"{self.prefix}/v1/stream?job_id={job_id}"
        pairs = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.server.open("GET", target, pairs)

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """What it says when it was told to stop."""
        target = f"{self.prefix}/v1/jobs/{job_id}/cancel"
        response = await self.server.fetch("POST", target)
        assert response.status == 200, response.body
        cancelled: dict[str, Any] = response.json()
        return cancelled

    async def finish(self, job_id: str) -> tuple[dict[str, Any], list[Told]]:
        """The job and its events when it is over, held against each other."""
        stream = await (await self.open(job_id)).whole()
        assert (stream.status, stream.end) == (200, "clean"), bytes(stream.body)
        job = await self.describe(job_id)
        return job, check_job(bytes(stream.body), job)

    async def until_status(self, job_id: str, status: str) -> None:
        """Wait for it."""
        await until(lambda: _status(self._registry, job_id) == status)

    @property
    def _registry(self) -> Any:
        return self.server.app[CONTEXT].jobs


def _status(registry: Any, job_id: str) -> str:
    job = registry._jobs[job_id]
    status: str = job.describe_briefly(registry.log_of(job))["status"]
    return status


@asynccontextmanager
async def jobs_on(
    upstream: FakeUpstream, *, slots: int = 1, **settings: Any
) -> AsyncIterator[Jobs]:
    """A server with one model of so many slots."""
    model = pyserve.ModelConfig("m", upstream=upstream.url, slots=slots, warm_up="")
    async with AsyncExitStack() as stack:
        yield Jobs(await stack.enter_async_context(serving(models=[model], **settings)))


def usage(prompt: int, completion: int) -> bytes:
    """The chunk that tells what was used."""
    told = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b"data: " + orjson.dumps({"choices": [], "usage": told}) + b"\n\n"


def finish(reason: str) -> bytes:
    """The chunk that tells why a model stopped."""
    choice = {"index": 0, "delta": {}, "finish_reason": reason}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"
