"""A session's bytes into an aiohttp response.

What a reader can rely on: the body ends cleanly only when the session is over and everything was
sent. In every other case, a lost prefix, a write that took too long, a shutdown, the connection is
reset, so that no proxy in between can take a loss for an end.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import weakref
from contextlib import suppress
from typing import Self
from urllib.parse import quote

from aiohttp import hdrs, web

from pyserve.errors import ApiError
from pyserve.positions import START, Position, parse_event_id, parse_position
from pyserve.requests import query_values, sole_query_value
from pyserve.sessions import READ_BYTES, StreamSession, StreamSessionManager

log = logging.getLogger("pyserve")

_EVENT_STREAM_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}

# Unsent bytes that asyncio holds for one reader, beside the kernel's buffer, before a write waits.
_TRANSPORT_BUFFER_BYTES = READ_BYTES

# How often the last bytes of an answer are looked after.
_FLUSH_POLL_S = 0.01

_PRINTABLE_ASCII = "".join(chr(code) for code in range(0x20, 0x7F))


class OpenReaders:
    """The connections that one manager's sessions are being written to, for its shutdown."""

    def __init__(self) -> None:
        self._transports: set[asyncio.Transport] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()

    def add(self, transport: asyncio.Transport) -> None:
        """A delivery begins."""
        self._transports.add(transport)
        self._none_left.clear()

    def remove(self, transport: asyncio.Transport) -> None:
        """It is over."""
        self._transports.discard(transport)
        if not self._transports:
            self._none_left.set()

    async def drain(self, timeout_s: float) -> None:
        """Wait until all are over, and reset who isn't after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        for transport in list(self._transports):
            reset_connection(transport)


_open_readers: weakref.WeakKeyDictionary[StreamSessionManager, OpenReaders] = (
    weakref.WeakKeyDictionary()
)


def open_readers(manager: StreamSessionManager) -> OpenReaders:
    """Who reads from the sessions of `manager`."""
    return _open_readers.setdefault(manager, OpenReaders())


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
            async for block in reader:
                await sender.write(block)
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


# What ends a delivery without being anybody's fault here.
_LOSSES = (ApiError, ConnectionError)


class Sender:
    """Sends one answer on a connection that is open: all of it reaches the kernel, or the
    connection is reset.

    Used as ``async with Sender(...) as sender``. A client that takes nothing for
    ``write_timeout_s`` while something is unsent is reset; so is everyone at an error in the block,
    of which the ones about a lost client or stream end here.
    """

    def __init__(
        self, request: web.Request, response: web.StreamResponse, manager: StreamSessionManager
    ) -> None:
        self._request = request
        self._response = response
        self._readers = open_readers(manager)
        self._config = manager.config
        self._loop = asyncio.get_running_loop()
        assert request.transport is not None
        self._transport = request.transport
        self._handed_bytes = 0
        self._taken_bytes = 0
        self._taken_at = self._loop.time()
        self._watch: asyncio.TimerHandle

    async def __aenter__(self) -> Self:
        _bound_buffers(self._transport, self._config.send_buffer_bytes)
        self._readers.add(self._transport)
        self._look_at_progress()
        return self

    async def begin(self) -> None:
        """Send the head."""
        await self._response.prepare(self._request)

    async def write(self, block: bytes) -> None:
        """Send `block`; waits while much is unsent."""
        self._handed_bytes += len(block)
        await self._response.write(block)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if error is None:
            try:
                await self._finish()
            except BaseException as failed:
                error = failed
        self._watch.cancel()
        self._readers.remove(self._transport)
        if error is None:
            return False
        reset_connection(self._transport)
        log.info("a reader was left: %r", error)
        if kind is None and not isinstance(error, _LOSSES):
            raise error
        return isinstance(error, _LOSSES)

    async def _finish(self) -> None:
        """End the body. It is over only when the kernel has it all: what asyncio still holds would
        die with the process, and look like an end."""
        await self._response.write_eof()
        while self._transport.get_write_buffer_size():
            if self._transport.is_closing():
                raise ConnectionResetError("the client left before the last byte")
            await asyncio.sleep(_FLUSH_POLL_S)

    def _look_at_progress(self) -> None:
        """Look now and then how much the client has taken; reset it when that is nothing."""
        now = self._loop.time()
        unsent = self._transport.get_write_buffer_size()
        taken = self._handed_bytes - unsent
        if taken != self._taken_bytes or not unsent:
            self._taken_bytes, self._taken_at = taken, now
        elif now - self._taken_at >= self._config.write_timeout_s:
            log.info("a reader took nothing for %g s", self._config.write_timeout_s)
            reset_connection(self._transport)
            return
        look_again_in_s = self._config.write_timeout_s / 4
        self._watch = self._loop.call_later(look_again_in_s, self._look_at_progress)


def _bound_buffers(transport: asyncio.Transport, send_buffer_bytes: int) -> None:
    transport.set_write_buffer_limits(high=_TRANSPORT_BUFFER_BYTES)
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family != getattr(socket, "AF_UNIX", None):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)


def reset_connection(transport: asyncio.Transport) -> None:
    """Drop the connection with a RST: nobody can mistake it for the end of a body, not even a proxy
    that speaks HTTP/1.0 to us."""
    connection = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        linger_for_0_s = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_0_s)
    transport.abort()
