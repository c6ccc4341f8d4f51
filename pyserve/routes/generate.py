"""``POST /v1/chat/completions`` and its kind: start a generation, or pass the request through."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
from collections.abc import Callable

from aiohttp import web

from pyserve.delivery import stream_response
from pyserve.errors import ApiError
from pyserve.positions import EARLIEST, START
from pyserve.producers.upstream import GENERATION_ROUTES, Route
from pyserve.requests import (
    conversation_id_of_post,
    idempotency_key_of,
    parse_json_object,
    read_body,
)
from pyserve.routes.context import Context, context_of
from pyserve.routes.proxy import forward_generation, model_of, request_headers
from pyserve.sessions import StreamSession

_CONFLICT_MODES = ("replace", "reject", "attach")


def add_generation_routes(app: web.Application) -> None:
    """One POST route for each of the upstream's generating ones."""
    for route in GENERATION_ROUTES:
        app.router.add_post(route.path, functools.partial(_generate, route))


async def _generate(route: Route, request: web.Request) -> web.StreamResponse:
    arrived = asyncio.get_running_loop().time()
    context = context_of(request)
    owner = await context.owner_of(request)
    body = await read_body(request, context.config)
    question = parse_json_object(body)
    wants_stream = question.get("stream") is True
    model = model_of(question)
    del question
    conversation_id = conversation_id_of_post(request)
    if conversation_id is None or not wants_stream:
        return await forward_generation(request, route.path, model, owner, body)

    conflict_mode = _conflict_mode(request)
    tag = _idempotency_tag(route, request, body)
    upload = io.BytesIO(body)
    del body  # it may be large, and this function goes on for as long as the generation
    present = context.manager.get(conversation_id, owner=owner)
    if present is not None:
        if _is_repeat(present, tag):
            await _wait_settled(context, present)
            return await stream_response(request, present, EARLIEST)
        if present.is_live and conflict_mode == "attach":
            return await stream_response(request, present, EARLIEST)
        if present.is_live and conflict_mode == "reject":
            raise ApiError("session_active", epoch=present.epoch)
    context.refuse_if_draining()
    context.scheduler.check(model)  # before a live stream makes room for what cannot be

    generation = context.generations.start(
        conversation_id,
        functools.partial(_produce, context, route, model, owner, request_headers(request), upload),
        owner=owner,
        dialect=route.dialect,
        tag=tag,
        grace_until=arrived + context.config.status_grace_s,
    )
    await generation.wait_settled()
    # From its first byte: who asked for an answer is told if even that was dropped meanwhile.
    return await stream_response(request, generation.session, START)


async def _produce(
    context: Context,
    route: Route,
    model: str | None,
    owner: str,
    headers: dict[str, str],
    upload: io.BytesIO,
    session: StreamSession,
    begin: Callable[[], None],
) -> str | None:
    async with context.scheduler.admit(model, owner) as slot:
        body = io.BytesIO(slot.adapt(upload.getvalue()))
        upload.close()
        return await slot.upstream.generate(route, headers, body, session, begin)


def _conflict_mode(request: web.Request) -> str:
    mode = request.headers.get("X-Stream-Conflict", "replace")
    if mode not in _CONFLICT_MODES:
        raise ApiError("invalid_parameter", "X-Stream-Conflict is replace, reject or attach")
    return mode


def _idempotency_tag(route: Route, request: web.Request, body: bytes) -> bytes:
    """Route, key and a digest of the body, for the session to carry; empty without a key."""
    key = idempotency_key_of(request)
    if not key:
        return b""
    scope = f"{route.path}\n{key}".encode(errors="surrogateescape")
    return hashlib.sha256(scope).digest() + hashlib.sha256(body).digest()


def _is_repeat(session: StreamSession, tag: bytes) -> bool:
    """Whether `session` was created by the same key.

    Raises:
        ApiError: it was, but with another body.
    """
    scope_length = hashlib.sha256().digest_size
    if not tag or session.tag[:scope_length] != tag[:scope_length]:
        return False
    if session.tag != tag:
        raise ApiError("idempotency_mismatch")
    return True


async def _wait_settled(context: Context, session: StreamSession) -> None:
    """A repeat that comes while the first is still starting shares its outcome."""
    generation = context.generations.get(session)
    if generation is not None:
        await generation.wait_settled()
