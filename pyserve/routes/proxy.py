"""Requests that pass through to the upstream as they are."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import hdrs, web

from pyserve.errors import ApiError
from pyserve.producers.upstream import Upstream
from pyserve.requests import parse_json_object, query_values, read_body
from pyserve.routes.context import Context, context_of
from pyserve.scheduling.scheduler import adapt_body
from pyserve.sender import Sender

#: Read-only and stateless routes of llama.cpp. What changes the upstream is not here.
GET_ROUTES = ["/props", "/slots", "/lora-adapters"]
POST_ROUTES = [
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/v1/rerank",
    "/rerank",
    "/reranking",
    "/infill",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
]

# It generates, and waits for a slot like any generation, but knows no streams that are kept.
_GENERATING = {"/infill"}

# Everything else of a request stays here: hop-by-hop headers, credentials, pyserve's own headers
# (with X-Conversation-Id llama.cpp would go on generating after pyserve has left).
_PASSED_ON = {"accept", "content-type", "user-agent", "traceparent", "tracestate"}
_PASSED_ON_PREFIXES = ("anthropic-", "openai-")
_PASSED_BACK = {"content-type", "retry-after", "cache-control"}

# How soon a client that left is noticed while nothing is sent to it.
_DISCONNECT_POLL_S = 0.1


def add_proxy_routes(app: web.Application) -> None:
    """The allow-list."""
    for path in GET_ROUTES:
        app.router.add_get(path, functools.partial(_pass_through, path), allow_head=False)
    for path in POST_ROUTES:
        handler = _generate if path in _GENERATING else _pass_through
        app.router.add_post(path, functools.partial(handler, path))


async def _pass_through(path: str, request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    await context.owner_of(request)
    if request.method != hdrs.METH_POST:
        names = query_values(request, "model")
        version = context.serving_version(names[0] if names else None)
        return await forward(request, version.upstream, path)
    body = await read_body(request, context.config)
    version = context.serving_version(_model_in(body, context))
    if version.config.upstream_model is not None and _json_object(body) is not None:
        body = adapt_body(body, version.config.upstream_model)
    return await forward(request, version.upstream, path, body)


async def _generate(path: str, request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    owner = await context.owner_of(request)
    body = await read_body(request, context.config)
    model = model_of(parse_json_object(body))
    return await forward_generation(request, path, model, owner, body)


def model_of(question: dict[str, Any]) -> str | None:
    """The model that a request names."""
    name = question.get("model")
    return name if isinstance(name, str) else None


def _model_in(body: bytes, context: Context) -> str | None:
    if context.models.sole is not None:
        return None  # which need not be looked for
    question = _json_object(body)
    return None if question is None else model_of(question)


def _json_object(body: bytes) -> dict[str, Any] | None:
    """What these routes take is the upstream's to say."""
    try:
        return parse_json_object(body)
    except ApiError:
        return None


def request_headers(request: web.Request) -> dict[str, str]:
    """The client's headers that the upstream may see."""
    return {
        name: value
        for name, value in request.headers.items()
        if name.lower() in _PASSED_ON or name.lower().startswith(_PASSED_ON_PREFIXES)
    }


async def forward_generation(
    request: web.Request, path: str, model: str | None, owner: str, body: bytes
) -> web.StreamResponse:
    """As :func:`forward`, for what needs a slot. Nothing is sent while it waits for one; a client
    that leaves, leaves the queue.

    Raises:
        ApiError: also for every refusal of the scheduler's.
    """
    context = context_of(request)
    context.refuse_if_draining()
    with context.generations.passing():
        async with (
            cancelled_on_disconnect(request),
            context.scheduler.admit(model, owner) as slot,
        ):
            upload = io.BytesIO(slot.adapt(body))
            del body  # it may be large
            return await _exchange(request, slot.upstream, path, upload)


async def forward(
    request: web.Request, upstream: Upstream, path: str, body: bytes | None = None
) -> web.StreamResponse:
    """Send the request on to `path` and stream the answer back. A client that leaves ends both.

    Raises:
        ApiError: the upstream failed before its answer began. Later the connection is reset.
    """
    async with cancelled_on_disconnect(request):
        query = request.rel_url.raw_query_string
        target = f"{path}?{query}" if query else path
        upload = io.BytesIO(body) if body is not None else None
        del body
        return await _exchange(request, upstream, target, upload)


async def _exchange(
    request: web.Request, upstream: Upstream, target: str, body: io.BytesIO | None
) -> web.StreamResponse:
    async with upstream.exchange(request.method, target, request_headers(request), body) as answer:
        response = web.StreamResponse(
            status=answer.status,
            headers={n: v for n, v in answer.headers.items() if n.lower() in _PASSED_BACK},
        )
        if request.transport is None:
            return response  # the client left before the first byte
        async with Sender(request, response, context_of(request).manager) as sender:
            await sender.begin()
            while block := await answer.read_block():
                await sender.write(block)
        return response


@asynccontextmanager
async def cancelled_on_disconnect(request: web.Request) -> AsyncIterator[None]:
    """Cancel the handler when its client is gone: aiohttp itself doesn't, and nothing is written
    while the upstream is silent that would tell."""
    handler = asyncio.current_task()
    assert handler is not None

    async def watch() -> None:
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(_DISCONNECT_POLL_S)
        handler.cancel()

    watching = asyncio.create_task(watch(), name="watch for a disconnect")
    try:
        yield
    finally:
        watching.cancel()
