"""One answer onto one connection: by the pump, or by Python where the pump can't.

All of an answer reaches the kernel, or the connection is reset: nobody takes a loss for an end.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import logging
import socket
import struct
import sys
import termios
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from pyserve import _core
from pyserve.config import Config
from pyserve.errors import ApiError
from pyserve.sessions import READ_BYTES, SessionReader, StreamSessionManager
from pyserve.wakeups import running_loop_waker

log = logging.getLogger("pyserve")

# Unsent bytes that asyncio holds for one reader, beside the kernel's buffer, before a write waits.
_TRANSPORT_BUFFER_BYTES = READ_BYTES

# What is left of a finished session costs less when it is written at once: 33 us for a small one
# where the pump's hand-over alone takes 14.
_WRITTEN_AT_ONCE_BYTES = 256 * 1024

# The largest that a socket option takes.
_MAX_INT = 2**31 - 1

# What ends a delivery without being anybody's fault here.
_LOSSES = (ApiError, ConnectionError)


class Deliveries:
    """The answers that one manager's sessions are being written into, and the pump that writes."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pump: _core.SocketPump | None = None
        self._senders: set[Sender] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def pump(self) -> _core.SocketPump:
        """Made at its first use."""
        if self._pump is None:
            self._pump = _core.SocketPump(
                write_timeout_s=self._config.write_timeout_s,
                coalesce_s=self._config.coalesce_ms / 1000,
            )
        return self._pump

    def close(self) -> None:
        """Stop the pump's thread. Everyone should have left; who hasn't is reset."""
        if self._pump is not None:
            self._pump.close()
            self._pump = None

    def add(self, sender: Sender) -> None:
        """A delivery begins."""
        self._senders.add(sender)
        self._none_left.clear()

    def remove(self, sender: Sender) -> None:
        """It is over."""
        self._senders.discard(sender)
        if not self._senders:
            self._none_left.set()

    async def drain(self, timeout_s: float) -> None:
        """Wait until all are over, and reset who isn't after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()
        for sender in list(self._senders):
            sender.reset()


_deliveries: weakref.WeakKeyDictionary[StreamSessionManager, Deliveries] = (
    weakref.WeakKeyDictionary()
)


def deliveries_of(manager: StreamSessionManager) -> Deliveries:
    """Who reads from the sessions of `manager`."""
    return _deliveries.setdefault(manager, Deliveries(manager.config))


class Sender:
    """Sends one answer on a connection that is open.

    Used as ``async with Sender(...) as sender``. A client that takes nothing for
    ``write_timeout_s`` while something is unsent is reset; so is everyone at an error in the block,
    of which the ones about a lost client or stream end here.
    """

    def __init__(
        self, request: web.Request, response: web.StreamResponse, manager: StreamSessionManager
    ) -> None:
        self._request = request
        self._response = response
        self._deliveries = deliveries_of(manager)
        self._config = manager.config
        self._loop = asyncio.get_running_loop()
        assert request.transport is not None
        self._transport = request.transport
        self._writer: AbstractStreamWriter
        self._detach: Callable[[], None] | None = None  # from the pump
        self._handed_bytes = 0
        self._taken_bytes = 0
        self._taken_at = self._loop.time()
        self._watch: asyncio.TimerHandle

    async def __aenter__(self) -> Self:
        _bound_connection(self._transport, self._config)
        self._deliveries.add(self)
        self._look_at_progress()
        return self

    async def begin(self) -> None:
        """Send the head."""
        writer = await self._response.prepare(self._request)
        assert writer is not None
        self._writer = writer
        if not self._is_chunked():  # only the connection's end tells how the answer ended
            _let_close_reset(self._transport, True)

    async def write(self, block: bytes) -> None:
        """Send `block`; waits while much is unsent."""
        self._handed_bytes += len(block)
        await self._response.write(block)

    async def send_log(self, reader: SessionReader) -> None:
        """Send what `reader` reads, to its end.

        Raises:
            ApiError: reason ``offset_lost``.
            ConnectionError: the client is gone, or took nothing for too long.
        """
        if self._is_pumpable() and not _is_short(reader) and await self._pump(reader):
            return
        async for block in reader:
            await self.write(block)

    def reset(self) -> None:
        """Break the answer off."""
        if self._detach is not None:
            self._detach()
        if self._request.transport is not None:  # asyncio's takes no orders once it is closed
            _reset_connection(self._transport)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if error is None:
            try:
                await self._finish()
            except BaseException as failed:
                error = failed
        self._watch.cancel()
        self._deliveries.remove(self)
        if error is None:
            return False
        self.reset()
        log.info("a reader was left: %r", error)
        if kind is None and not isinstance(error, _LOSSES):
            raise error
        return isinstance(error, _LOSSES)

    async def _finish(self) -> None:
        """End the body. It is over only when the kernel has it all: what asyncio still holds would
        die with the process, and look like an end."""
        self._check_open()  # uvloop's transports take no orders once they are closed
        self._transport.set_write_buffer_limits(high=0)
        await self._response.write_eof()
        self._check_open()
        _let_close_reset(self._transport, False)

    def _check_open(self) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client left before the last byte")

    def _look_at_progress(self) -> None:
        """Look now and then how much the client has taken; reset it when that is nothing."""
        now = self._loop.time()
        unsent = self._transport.get_write_buffer_size() + _kernel_unsent_bytes(self._transport)
        taken = self._handed_bytes - unsent
        if taken != self._taken_bytes or not unsent:
            self._taken_bytes, self._taken_at = taken, now
        elif now - self._taken_at >= self._config.write_timeout_s:
            log.info("a reader took nothing for %g s", self._config.write_timeout_s)
            _reset_connection(self._transport)
            return
        look_again_in_s = self._config.write_timeout_s / 4
        self._watch = self._loop.call_later(look_again_in_s, self._look_at_progress)

    def _is_chunked(self) -> bool:
        return self._response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"

    # --- by the pump

    def _is_pumpable(self) -> bool:
        """Whether bare chunks on a bare socket are what this answer is made of."""
        return (
            hasattr(_core, "SocketPump")
            and self._is_chunked()
            and hdrs.CONTENT_ENCODING not in self._response.headers
            and self._transport.get_extra_info("ssl_object") is None
            and self._transport.get_extra_info("socket") is not None
        )

    async def _pump(self, reader: SessionReader) -> bool:
        """As send_log(). False when no descriptor is left; nothing was sent then."""
        # Nothing of ours may be on its way when another writes.
        self._check_open()
        self._transport.set_write_buffer_limits(high=0)
        await self._writer.drain()
        self._check_open()
        self._watch.cancel()
        try:
            delivery, done = self._hand_over(reader)
        except OSError as error:
            log.warning("a reader is served without the pump: %s", error.strerror)
            self._look_at_progress()
            return False
        try:
            # A handler may be cancelled; what it began is over only when the pump says so.
            await asyncio.shield(done)
        finally:
            self._writer.output_size += delivery.sent_bytes  # the access log's
        self._detach = None
        self._raise_loss(delivery.outcome, reader)
        self._look_at_progress()
        return True

    def _hand_over(self, reader: SessionReader) -> tuple[_core.Delivery, asyncio.Future[None]]:
        """Begin; the future is done when the delivery is over.

        Raises:
            OSError: no descriptor is left, for the pump itself perhaps.
        """
        pump, waker = self._deliveries.pump, running_loop_waker()
        token, done = waker.expect()
        connection = self._transport.get_extra_info("socket").fileno()
        try:
            delivery = reader.hand_over(pump, connection, waker.wakeup, token)
        except BaseException:
            waker.forget(token)
            raise
        self._detach = functools.partial(pump.detach, delivery)
        done.add_done_callback(lambda _: pump.collect())
        return delivery, done

    def _raise_loss(self, outcome: str, reader: SessionReader) -> None:
        if outcome == "lost":
            raise reader.session.offset_error("offset_lost")
        if outcome == "stalled":
            raise ConnectionAbortedError(
                f"a reader took nothing for {self._config.write_timeout_s:g} s"
            )
        if outcome != "end":
            raise ConnectionResetError("the client left before the last byte")


def _is_short(reader: SessionReader) -> bool:
    now = reader.session.snapshot()
    return not now.is_live and now.end_offset - reader.offset <= _WRITTEN_AT_ONCE_BYTES


def _bound_connection(transport: asyncio.Transport, config: Config) -> None:
    """Bound what a client that takes nothing holds."""
    transport.set_write_buffer_limits(high=_TRANSPORT_BUFFER_BYTES)
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        size_bytes = min(config.send_buffer_bytes, _MAX_INT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size_bytes)


def _kernel_unsent_bytes(transport: asyncio.Transport) -> int:
    """What the kernel holds for the client: not sent, or not acknowledged; 0 where it doesn't say.

    A slow client makes room for asyncio's next write too rarely to be told from a dead one by that.
    """
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None or connection.fileno() < 0:
        return 0
    answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ for a socket
    return int.from_bytes(answer, sys.byteorder)


def _let_close_reset(transport: asyncio.Transport, reset: bool) -> None:
    """Whether the connection's close, by whomever, is a RST: nobody can mistake that for the end of
    a body, not even a proxy that speaks HTTP/1.0 to us."""
    connection = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        for_0_s = struct.pack("ii", reset, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, for_0_s)


def _reset_connection(transport: asyncio.Transport) -> None:
    """Drop the connection with a RST."""
    _let_close_reset(transport, True)
    transport.abort()
