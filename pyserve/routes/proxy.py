"""Requests that pass through to the upstream as they are."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import hdrs, web

from pyserve.producers.upstream import Upstream
from pyserve.requests import read_body
from pyserve.routes.context import context_of
from pyserve.sender import Sender

#: Read-only and stateless routes of llama.cpp. What changes the upstream is not here.
GET_ROUTES = ["/props", "/slots", "/v1/models", "/models", "/lora-adapters"]
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
        app.router.add_post(path, functools.partial(_pass_through, path))


async def _pass_through(path: str, request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    await context.owner_of(request)
    upstream = context.require_upstream()
    body = None
    if request.method == hdrs.METH_POST:
        body = io.BytesIO(await read_body(request, context.config))
    query = request.rel_url.raw_query_string
    return await forward(request, upstream, f"{path}?{query}" if query else path, body)


def request_headers(request: web.Request) -> dict[str, str]:
    """The client's headers that the upstream may see."""
    return {
        name: value
        for name, value in request.headers.items()
        if name.lower() in _PASSED_ON or name.lower().startswith(_PASSED_ON_PREFIXES)
    }


async def forward(
    request: web.Request, upstream: Upstream, path: str, body: io.BytesIO | None
) -> web.StreamResponse:
    """Send the request on to `path` and stream the answer back. A client that leaves ends both.

    Raises:
        ApiError: the upstream failed before its answer began. Later the connection is reset.
    """
    async with (
        _cancelled_on_disconnect(request),
        upstream.exchange(request.method, path, request_headers(request), body) as answer,
    ):
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
async def _cancelled_on_disconnect(request: web.Request) -> AsyncIterator[None]:
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
