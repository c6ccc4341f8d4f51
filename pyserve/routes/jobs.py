"""Jobs: submit, look at, cancel; streams of many jobs; and ``POST /infer``, a job as plain text."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from aiohttp import web

from pyserve.client.sse import Decoder, Event
from pyserve.errors import ApiError
from pyserve.jobs.job import Job
from pyserve.jobs.registry import Idempotency
from pyserve.jobs.request import parse_infer_request, parse_job_request
from pyserve.positions import EARLIEST
from pyserve.requests import idempotency_key_of, parse_json_object, read_body
from pyserve.routes.context import Context, context_of
from pyserve.routes.proxy import cancelled_on_disconnect
from pyserve.sender import Sender
from pyserve.sessions import StreamSession

_JOBS = "/v1/jobs"
_STREAMS = "/v1/streams"

_LINE_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


def add_job_routes(app: web.Application) -> None:
    """``/v1/jobs``, ``/v1/streams`` and ``/infer``."""
    app.router.add_post(_JOBS, _submit)
    app.router.add_get(_JOBS + "/{job_id}", _describe)
    app.router.add_post(_JOBS + "/{job_id}/cancel", _cancel)
    app.router.add_post(_STREAMS, _create_stream)
    app.router.add_post("/infer", _infer)


async def _submit(request: web.Request) -> web.Response:
    context = context_of(request)
    grace_until = _grace_until(context)
    owner = await context.owner_of(request)
    body = await read_body(request, context.config)
    asked = parse_job_request(parse_json_object(body))
    key = idempotency_key_of(request)
    idempotency = Idempotency(key, hashlib.sha256(body).digest()) if key else None
    del body  # it may be large
    context.refuse_if_draining()
    job, is_repeat = context.jobs.submit(
        owner, asked, grace_until=grace_until, idempotency=idempotency
    )
    del asked
    log = await context.jobs.settle(job)
    told = job.describe_briefly(log)
    told["stream_url"] = _stream_url(request, _JOBS, "job_id", job.id)
    if is_repeat:
        return _json(told, headers={"Idempotent-Replayed": "true"})
    return _json(told, status=202)


def _grace_until(context: Context) -> float:
    return asyncio.get_running_loop().time() + context.config.status_grace_s


def _stream_url(request: web.Request, route: str, parameter: str, name: str) -> str:
    """Below the prefix under which the application is mounted; never with a host."""
    assert request.match_info.route.resource is not None
    prefix = request.match_info.route.resource.canonical.removesuffix(route)
    return f"{prefix}/v1/stream?{parameter}={name}"


def _json(data: dict[str, Any], status: int = 200, headers: Any = None) -> web.Response:
    return web.Response(
        status=status, body=orjson.dumps(data), content_type="application/json", headers=headers
    )


async def _describe(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    job, log = context.jobs.get(request.match_info["job_id"], owner)
    return _json(job.describe(log))


async def _cancel(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    job, log = context.jobs.get(request.match_info["job_id"], owner)
    log.cancel()
    return _json(job.describe(log))


async def _create_stream(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    context.refuse_if_draining()
    stream_id = context.jobs.streams.create(owner)
    stream_url = _stream_url(request, _STREAMS, "stream_id", stream_id)
    return _json({"stream_id": stream_id, "stream_url": stream_url}, status=201)


# --- a job as plain text


async def _infer(request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    grace_until = _grace_until(context)
    owner = await context.owner_of(request)
    asked = parse_infer_request(parse_json_object(await read_body(request, context.config)))
    context.refuse_if_draining()
    async with cancelled_on_disconnect(request):
        job, _ = context.jobs.submit(owner, asked, grace_until=grace_until)
        try:
            log = await context.jobs.settle(job)
            return await _send_lines(request, job, log)
        finally:
            context.jobs.cancel(job)


async def _send_lines(request: web.Request, job: Job, log: StreamSession) -> web.StreamResponse:
    """The job's tokens, one a line: ``\\n``, ``\\r`` and ``\\\\`` stand for what a token holds of
    line ends and backslashes. A last line ``\\error`` names the reason of a failure.

    Raises:
        ApiError: the job failed, or was cancelled, before its first token.
    """
    lines = _lines(log)
    first = await anext(lines, b"")
    if not first and (error := _failure(job, log)) is not None:
        raise error
    headers = {"X-Job-Id": job.id, "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/plain"
    response.charset = "utf-8"
    if request.transport is None:
        return response
    async with Sender(request, response, log.manager) as sender:
        await sender.begin()
        await sender.write(first)
        async for line in lines:
            await sender.write(line)
        if (error := _failure(job, log)) is not None:
            await sender.write(f"\\error {error.reason}\n".encode())
    return response


async def _lines(log: StreamSession) -> AsyncIterator[bytes]:
    decoder = Decoder()
    async for block in log.read_from(EARLIEST):
        lines = [
            item.json()["token"].translate(_LINE_ESCAPES) + "\n"
            for item in decoder.feed(block)
            if isinstance(item, Event) and item.event == "token"
        ]
        if lines:
            yield "".join(lines).encode()


def _failure(job: Job, log: StreamSession) -> ApiError | None:
    """What ended a job that is over, if that is not its own end."""
    now = log.snapshot()
    if now.state == "completed":
        return None
    return job.error(now.reason) if now.state == "failed" else ApiError("cancelled")
