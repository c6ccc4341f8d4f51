"""Reading, looking up and stopping streams."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import hdrs, web

from pyserve.delivery import stream_response
from pyserve.errors import ApiError
from pyserve.requests import conversation_id_in_url, parse_json_object, query_values, read_body
from pyserve.routes.context import context_of
from pyserve.sessions import StreamSession

#: llama.cpp's page sends every conversation it knows.
MAX_LOOKUP_IDS = 10_000
MAX_LOOKUP_BODY_BYTES = 2 * 1024 * 1024


def add_stream_routes(app: web.Application) -> None:
    """``/v1/stream/<id>``, ``/v1/stream?conv_id=<id>`` and ``/v1/streams/lookup``."""
    for path in ("/v1/stream", "/v1/stream/{conversation_id:(?s:.*)}"):
        app.router.add_get(path, _read, allow_head=False)
        # aiohttp would run the GET for it, to its end.
        app.router.add_head(path, _read)
        app.router.add_delete(path, _stop)
    app.router.add_post("/v1/streams/lookup", _lookup)


async def _read(request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    owner = await context.owner_of(request)
    conversation_id = conversation_id_in_url(request)
    session = context.manager.get(conversation_id, owner=owner)
    if session is None:
        raise ApiError("stream_not_found")
    return await stream_response(request, session)


async def _stop(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    conversation_id = conversation_id_in_url(request)
    session = context.manager.get(conversation_id, owner=owner)
    if session is not None:
        _check_if_match(request, session)
        if query_values(request, "keep") == ["true"]:
            session.cancel()
        else:
            context.manager.evict_and_cancel(conversation_id, owner=owner, epoch=session.epoch)
    return web.Response(status=204)


def _check_if_match(request: web.Request, session: StreamSession) -> None:
    wanted = request.headers.get(hdrs.IF_MATCH)
    if wanted is not None and wanted not in ("*", f'"{session.epoch}"'):
        raise ApiError("epoch_mismatch", epoch=session.epoch)


async def _lookup(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    body = parse_json_object(await read_body(request, context.config, MAX_LOOKUP_BODY_BYTES))
    ids = body.get("conversation_ids")
    if not isinstance(ids, list):
        raise ApiError("invalid_body", "conversation_ids must be an array")
    if len(ids) > MAX_LOOKUP_IDS:
        raise ApiError(
            "invalid_body", "There are too many conversation_ids", max_ids=MAX_LOOKUP_IDS
        )
    # What isn't an id matches nothing.
    texts = [item for item in ids if isinstance(item, str)]
    found = context.manager.lookup(texts, owner=owner)
    return web.Response(
        body=orjson.dumps([_describe(session) for session in found]),
        content_type="application/json",
    )


def _describe(session: StreamSession) -> dict[str, Any]:
    now = session.snapshot()
    return {
        "conversation_id": session.conversation_id,
        "is_done": not now.is_live,
        "total_bytes": now.end_offset,
        "started_at": int(now.started_at),
        "completed_at": int(now.completed_at),
        "state": now.state,
        "epoch": session.epoch,
        "first_offset": now.first_offset,
        "readers": now.readers,
        "reason": now.reason or None,
    }
