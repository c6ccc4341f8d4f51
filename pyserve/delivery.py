"""A session's bytes into an aiohttp response.

What a reader can rely on: the body ends cleanly only when the session is over and everything was
sent. In every other case, a lost prefix, a write that took too long, a shutdown, the connection is
reset, so that no proxy in between can take a loss for an end.
"""

from __future__ import annotations

from urllib.parse import quote

from aiohttp import hdrs, web

from pyserve.errors import ApiError
from pyserve.positions import START, Position, parse_event_id, parse_position
from pyserve.requests import query_values, sole_query_value
from pyserve.sender import Sender
from pyserve.sessions import StreamSession

_EVENT_STREAM_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}

_PRINTABLE_ASCII = "".join(chr(code) for code in range(0x20, 0x7F))


def position_of(request: web.Request) -> tuple[Position, bool]:
    """Where the request wants to read from, and whether ``Last-Event-ID`` said so.

    ``Last-Event-ID`` wins over ``from``, since EventSource repeats its URL when it reconnects.

    Raises:
        ApiError: reason ``invalid_offset``.
    """
    ids = [text for text in request.headers.getall("Last-Event-ID", []) if text]
    if len(ids) > 1:
        raise ApiError("invalid_offset")
    if ids:
        return parse_event_id(ids[0]), True
    if not query_values(request, "from"):
        return START, False
    return parse_position(sole_query_value(request, "from", "invalid_offset")), False


def stream_headers(session: StreamSession, offset: int) -> dict[str, str]:
    """The headers of a response that reads `session` from `offset` on."""
    return {
        **_EVENT_STREAM_HEADERS,
        "X-Conversation-Id": quote(session.conversation_id, safe=_PRINTABLE_ASCII),
        "X-Stream-Epoch": session.epoch,
        "X-Stream-Offset": str(offset),
    }


async def stream_response(
    request: web.Request, session: StreamSession, position: Position | None = None
) -> web.StreamResponse:
    """Answer `request` with `session`, from `position` or from where the request says, to its end.

    Without a position in the request that is the start. 204 where an EventSource has nothing to
    come back for: the session is over and no event follows its ``Last-Event-ID``.

    Raises:
        ApiError: ``invalid_offset``, ``offset_lost``, ``offset_ahead`` or ``stream_replaced``;
            nothing was sent.
    """
    if position is None:
        position, by_event_id = position_of(request)
        if _nothing_to_come(session, position, by_event_id):
            return web.Response(status=204)
    reader = session.read_from(position)
    try:
        response = web.StreamResponse(headers=stream_headers(session, reader.offset))
        if request.method == hdrs.METH_HEAD or request.transport is None:
            return response
        async with Sender(request, response, session.manager) as sender:
            await sender.begin()
            await sender.send_log(reader)
        return response
    finally:
        reader.close()


def _nothing_to_come(session: StreamSession, position: Position, by_event_id: bool) -> bool:
    now = session.snapshot()
    if now.is_live or (position.epoch is not None and position.epoch != session.epoch):
        return False
    if now.last_event_end == 0:
        return True
    return (
        by_event_id
        and position.offset is not None
        and now.last_event_end <= position.offset <= now.end_offset
    )
