"""What a request says, read strictly: conversation ids, query values, JSON bodies."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote_plus, unquote_to_bytes

import orjson
from aiohttp import web
from aiohttp.http import HttpProcessingError

from pyserve.config import Config
from pyserve.errors import ApiError
from pyserve.sessions import is_conversation_id


def query_values(request: web.Request, name: str) -> list[str]:
    """All values of a query parameter, percent-decoded; bytes that aren't UTF-8 become surrogates,
    so that nothing that checks them can take them for text."""
    values = []
    for pair in request.rel_url.raw_query_string.split("&"):
        key, _, value = pair.partition("=")
        if unquote_plus(key) == name:
            values.append(unquote_plus(value, errors="surrogateescape"))
    return values


def sole_query_value(request: web.Request, name: str, reason: str) -> str:
    """The one value of a query parameter.

    Raises:
        ApiError: with `reason`, when it is missing or given twice.
    """
    values = query_values(request, name)
    if len(values) != 1:
        raise ApiError(reason)
    return values[0]


def _checked(conversation_id: str) -> str:
    if not is_conversation_id(conversation_id):
        raise ApiError("invalid_conversation_id")
    return conversation_id


def conversation_id_in_url(request: web.Request) -> str:
    """The id in the path behind the route's prefix, or in ``?conv_id=`` where the route has none.

    Raises:
        ApiError: reason ``invalid_conversation_id``.
    """
    assert request.match_info.route.resource is not None
    prefix, has_id, _ = request.match_info.route.resource.canonical.partition("{")
    if not has_id:
        return _checked(sole_query_value(request, "conv_id", "invalid_conversation_id"))
    # Not match_info, which keeps %2F and %25 as they are; an id may hold both. The prefix may come
    # percent-encoded too, which changes its length but not its slashes.
    raw = request.rel_url.raw_path.split("/", prefix.count("/"))[-1]
    return _checked(unquote_to_bytes(raw).decode(errors="surrogateescape"))


def conversation_id_of_post(request: web.Request) -> str | None:
    """The id in ``X-Conversation-Id`` (raw UTF-8) or ``?conv_id=``; None if it is absent or empty.

    Raises:
        ApiError: reason ``invalid_conversation_id``, also when more than one is given.
    """
    given = {*request.headers.getall("X-Conversation-Id", []), *query_values(request, "conv_id")}
    given.discard("")
    if not given:
        return None
    if len(given) > 1:
        raise ApiError("invalid_conversation_id")
    return _checked(given.pop())


_MAX_IDEMPOTENCY_KEY_CHARS = 255


def idempotency_key_of(request: web.Request) -> str:
    """The ``Idempotency-Key``, empty where there is none.

    Raises:
        ApiError: reason ``invalid_parameter``.
    """
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > _MAX_IDEMPOTENCY_KEY_CHARS:
        raise ApiError("invalid_parameter", "Idempotency-Key is longer than 255 characters")
    return key


async def read_body(
    request: web.Request, config: Config, max_body_bytes: int | None = None
) -> bytes:
    """The whole body, whatever limit the embedding application has for its own routes; at most
    `max_body_bytes`, by default ``config.max_body_bytes``.

    Raises:
        ApiError: reason ``body_too_large``; ``invalid_body`` where it broke off, came to a halt or
            isn't encoded as its headers say.
    """
    if max_body_bytes is None:
        max_body_bytes = config.max_body_bytes
    body = bytearray()
    try:
        if request.content.at_eof():
            return await request.read()  # empty, or an authenticate() has read it
        while block := await _read_block(request, config.body_idle_timeout_s):
            body += block
            if len(body) > max_body_bytes:
                raise ApiError("body_too_large", max_body_bytes=max_body_bytes)
    except (web.RequestPayloadError, HttpProcessingError, ConnectionError, TimeoutError):
        # Nobody knows where a next request would begin, and aiohttp is not to look for it.
        request.content.feed_eof()
        if request.protocol is not None:
            request.protocol.close()
        raise ApiError("invalid_body") from None
    return bytes(body)


async def _read_block(request: web.Request, idle_timeout_s: float) -> bytes:
    async with asyncio.timeout(idle_timeout_s):
        return await request.content.readany()


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: reason ``invalid_body``; also for lone surrogates and nesting beyond 1,024
            levels.
    """
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ApiError("invalid_body") from None
    if not isinstance(parsed, dict):
        raise ApiError("invalid_body")
    return parsed
