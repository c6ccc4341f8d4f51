"""Reading, looking up and stopping streams."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import hdrs, web

from pyserve.delivery import stream_response
from pyserve.errors import ApiError
from pyserve.requests import (
    conversation_id_in_url,
    parse_json_object,
    query_values,
    read_body,
    sole_query_value,
)
from pyserve.routes.context import Context, context_of
from pyserve.sessions import StreamSession

#: llama.cpp's page sends every conversation it knows.
MAX_LOOKUP_IDS = 10_000
MAX_LOOKUP_BODY_BYTES = 2 * 1024 * 1024


def add_stream_routes(app: web.Application) -> None:
    """``/v1/stream/<id>``, ``/v1/stream?conv_id=<id>`` (or ``job_id``, ``stream_id``) and
    ``/v1/streams/lookup``."""
    for path in ("/v1/stream", "/v1/stream/{conversation_id:(?s:.*)}"):
        app.router.add_get(path, _read, allow_head=False)
        # aiohttp would run the GET for it, to its end.
        app.router.add_head(path, _read)
        app.router.add_delete(path, _stop)
    app.router.add_post("/v1/streams/lookup", _lookup)


async def _read(request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    owner = await context.owner_of(request)
    kind, name = _named_stream(request)
    if kind == "conv_id":
        session = context.manager.newest(name, owner=owner)
    else:
        session = _find(context, kind, name, owner)
    if session is None:
        raise ApiError("stream_not_found")
    return await stream_response(request, session)


async def _stop(request: web.Request) -> web.Response:
    context = context_of(request)
    owner = await context.owner_of(request)
    kind, name = _named_stream(request)
    if kind == "conv_id":
        sessions = context.manager.sessions_of(name, owner=owner)
    else:
        found = _find(context, kind, name, owner)
        sessions = [] if found is None else [found]
    keep = query_values(request, "keep") == ["true"]
    for session in _matching(request, sessions):
        if keep:
            session.cancel()
        else:
            key, epoch = session.key, session.epoch
            context.manager.evict_and_cancel(key, owner=owner, epoch=epoch)
            context.jobs.forget(session)
    return web.Response(status=204)


def _named_stream(request: web.Request) -> tuple[str, str]:
    """By what the request names a stream, and the name.

    Raises:
        ApiError: reason ``invalid_parameter`` where it names two; ``invalid_conversation_id``.
    """
    in_path = request.match_info.get("conversation_id") is not None
    others = [name for name in ("job_id", "stream_id") if query_values(request, name)]
    if not others:
        return "conv_id", conversation_id_in_url(request)
    if len(others) > 1 or in_path or query_values(request, "conv_id"):
        raise ApiError(
            "invalid_parameter", "A stream is named by one of conv_id, job_id, stream_id"
        )
    (kind,) = others
    return kind, sole_query_value(request, kind, "invalid_parameter")


def _find(context: Context, kind: str, name: str, owner: str) -> StreamSession | None:
    try:
        if kind == "job_id":
            return context.jobs.get(name, owner)[1]
        return context.jobs.streams.get(name, owner)
    except ApiError:
        return None


def _matching(request: web.Request, sessions: list[StreamSession]) -> list[StreamSession]:
    """Those that ``If-Match`` means, all of them without one.

    Raises:
        ApiError: reason ``epoch_mismatch``: there are only others.
    """
    wanted = request.headers.get(hdrs.IF_MATCH)
    if wanted is None or wanted == "*":
        return sessions
    matching = [session for session in sessions if wanted == f'"{session.epoch}"']
    if sessions and not matching:
        raise ApiError("epoch_mismatch", epoch=sessions[-1].epoch)
    return matching


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
