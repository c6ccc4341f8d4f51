"""A stream as an async iterator that survives its connections."""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

import aiohttp

from pyserve.client.errors import (
    AnswerError,
    ClientError,
    NotPyserveError,
    OffsetLostError,
    UnreachableError,
    gone_error,
    replaced_error,
)
from pyserve.client.lookup import lookup_request, parse_lookup
from pyserve.client.rules import When
from pyserve.client.sse import Comment, Decoder, Event
from pyserve.client.transport import Backoff, Request, Transport, cause
from pyserve.positions import Position

State = Literal["streaming", "completed", "failed", "cancelled"]

_END = re.compile(r"end (completed|failed|cancelled)(?: ([a-z0-9_]+))?")
# A connection that lived this long was a good one, even if no event came: its end is no repetition
# of an earlier failure.
_STEADY_S = 10.0


@dataclass(frozen=True)
class Gap:
    """Bytes that were dropped before they were read: from `first` up to, without, `end`."""

    first: int
    end: int


@dataclass(frozen=True)
class Connection:
    """News for ``on_connection``: attached at `offset`, or (with `error`) the next try comes in
    `retry_in_s`."""

    offset: int | None
    error: ClientError | None = None
    retry_in_s: float = 0.0


T = TypeVar("T")


class Stream(AsyncIterator[T], Generic[T]):
    """A place in a stream that moves forward, whatever happens to the connection.

    An iteration that ends without an exception has reached the generation's end; ``state`` and
    ``reason`` then tell which (a stream that a newer one replaced is ``cancelled``, too). A
    ``break``, :meth:`close` or ``async with`` detaches; to attach again later give ``position`` to
    :meth:`Client.attach`. One task at a time may iterate; one that is cancelled while it waits for
    the next item loses nothing. :meth:`close` from another task ends the iteration at once, as at
    the end, but with ``state`` still ``streaming``.
    """

    def __init__(
        self,
        transport: Transport,
        conversation_id: str,
        position: Position,
        on_gap: Callable[[Gap], None] | None,
        on_connection: Callable[[Connection], None] | None,
        opening: Request | None = None,
    ) -> None:
        self.conversation_id = conversation_id
        #: ``streaming`` until the iteration has ended, then ``completed``, ``failed`` or
        #: ``cancelled``.
        self.state: State = "streaming"
        #: Why it failed, one of pyserve's words; None otherwise.
        self.reason: str | None = None
        #: Which of the conversation's streams this is; None before the first answer.
        self.epoch = position.epoch
        #: The end of the last item handed out; None before the first answer of ``"earliest"``.
        self.offset = position.offset

        self._transport = transport
        self._on_gap = on_gap
        self._on_connection = on_connection or (lambda _news: None)
        self._opening = opening  # the POST, until it was answered
        self._was_attached = False
        self._response: aiohttp.ClientResponse | None = None
        self._attached_at = 0.0
        self._backoff = Backoff(transport.limits)
        self._next_offset = position.offset  # to attach at; None is the earliest
        self._gap_start: int | None = None
        self._ready: deque[tuple[T, int | None]] = deque()  # items with their end offsets
        self._decoder = Decoder()
        self._last_line: Comment | None = None  # if it was a comment between two events
        self._body_end = 0  # the offset behind the last byte that came
        self._body_brought_items = False
        self._ending: tuple[State, str | None] | None = None
        self._closed = False
        self._step: asyncio.Timeout | None = None  # where close() gets at what is waited for

    @property
    def position(self) -> str | None:
        """``<epoch>-<offset>`` behind the last item handed out; None before the first answer."""
        if self.epoch is None or self.offset is None:
            return None
        return f"{self.epoch}-{self.offset}"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            while not self._ready and self._ending is None and not self._closed:
                await self._advance()
        except Exception:
            self._detach()
            self._closed = True
            raise
        if self._ready and not self._closed:
            item, self.offset = self._ready.popleft()
            return item
        if self._ending is not None and not self._closed:
            self.state, self.reason = self._ending
        self._closed = True
        self._detach()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Detach. The generation goes on. Closing twice does nothing."""
        if self._step is not None and not self._closed:
            self._step.reschedule(0)  # now
        self._closed = True
        self._detach()

    def __del__(self) -> None:
        # Who leaves a loop by `break` has let go of the stream: leave the server, too.
        if getattr(self, "_response", None) is not None:
            self._detach()

    def _detach(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    # --- one step

    async def _advance(self) -> None:
        """One step, which :meth:`close` cuts short."""
        try:
            async with asyncio.timeout(None) as self._step:
                await self._go_on()
        except TimeoutError:
            if not self._closed:
                raise
        finally:
            self._step = None

    async def _go_on(self) -> None:
        """Attach, or take what comes next; after a loss wait a while."""
        try:
            if self._response is None:
                await self._attach()
                return
            block = await self._read_block(self._response)
            if not block:
                await self._end_body()
                return
        except ClientError as error:
            self._detach()
            if not self._ending_is_told():
                await self._pause(error)
            return
        self._body_end += len(block)
        items = self._decoder.feed(block)
        self._last_line = None
        if items and isinstance(items[-1], Comment) and self._decoder.between_events:
            self._last_line = items[-1]
        if self._take(block, items):
            self._body_brought_items = True
            self._backoff.reset()

    async def _read_block(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            async with asyncio.timeout(self._transport.limits.stall_timeout_s):
                return await response.content.readany()
        except TimeoutError:
            silence_s = self._transport.limits.stall_timeout_s
            raise UnreachableError(f"no heartbeat for {silence_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"connection lost: {cause(error)}") from error

    async def _end_body(self) -> None:
        """A clean end: of the stream if its last line says so, else only of the answer. Who began
        to read behind that line, or in it, has not seen it."""
        if self._ending_is_told():
            self._detach()
        elif not self._body_brought_items:
            await self._ask_for_ending(self._body_end)
        else:
            raise UnreachableError("the answer ended before the stream did")

    async def _pause(self, error: ClientError) -> None:
        clock = asyncio.get_running_loop().time
        if self._attached_at and clock() - self._attached_at > _STEADY_S:
            self._backoff.reset()
        self._attached_at = 0.0
        delay_s = self._backoff.next_delay_s(error, self._when())
        self._on_connection(Connection(self._next_offset, error, delay_s))
        await asyncio.sleep(delay_s)

    def _when(self) -> When:
        if self._opening is not None:
            return "submit"
        return "reattach" if self._was_attached else "attach"

    def _ending_is_told(self) -> bool:
        """Whether the last line says how the stream ended; a comment in the middle says nothing."""
        match = _END.fullmatch(self._last_line.text) if self._last_line else None
        if match is not None:
            self._ending = (match[1], match[2])  # type: ignore[assignment]
        return match is not None

    @abstractmethod
    def _take(self, block: bytes, items: list[Event | Comment]) -> bool:
        """Make items ready; whether that was a step forward."""

    # --- attaching

    async def _attach(self) -> None:
        try:
            response = await self._transport.send(self._opening or self._read_request())
        except OffsetLostError:
            if self._on_gap is None:
                raise
            self._gap_start, self._next_offset = self._next_offset, None
            return
        except AnswerError as error:
            if not (self._opening and error.reason == "cancelled"):
                raise
            self._ending = ("cancelled", None)  # stopped before it had begun
            return
        self._opening = None
        if response.status == 204:
            response.release()
            await self._ask_for_ending()
            return
        try:
            self._begin(response)
        except BaseException:
            response.close()
            raise

    def _read_request(self) -> Request:
        position = "earliest"
        if self._next_offset is not None:
            epoch = f"{self.epoch}-" if self.epoch else ""
            position = f"{epoch}{self._next_offset}"
        return Request("GET", "/v1/stream", self.conversation_id, {"from": position})

    def _begin(self, response: aiohttp.ClientResponse) -> None:
        epoch = response.headers.get("X-Stream-Epoch", "")
        offset_text = response.headers.get("X-Stream-Offset", "")
        if response.content_type != "text/event-stream" or not epoch or not offset_text.isdecimal():
            raise NotPyserveError(f"{self._transport.base_url} is not a pyserve")
        if self.epoch not in (None, epoch):  # told by `from=earliest` only, which names no epoch
            raise replaced_error(epoch)
        offset = int(offset_text)
        if self._next_offset is not None and offset < self._next_offset:
            # Reading on would double what was read.
            raise NotPyserveError(f"{self._transport.base_url} ignores where to read from")
        self.epoch = epoch
        self._was_attached = True
        self._tell_gap(offset)
        self._next_offset = offset
        self._attached_at = asyncio.get_running_loop().time()
        self._last_line = None
        self._body_end = offset
        self._body_brought_items = False
        self._on_attached()
        self._response = response
        self._on_connection(Connection(self._next_offset))

    def _tell_gap(self, offset: int) -> None:
        wanted = self._gap_start if self._next_offset is None else self._next_offset
        self._gap_start = None
        if wanted is None or offset <= wanted:
            if self.offset is None:
                self.offset = offset
            return
        if self._on_gap is None:  # a repeated POST is answered from the earliest byte on
            message = "Stream offset lost, please restart"
            raise OffsetLostError(200, "offset_lost", message, first_offset=offset)
        self.offset = offset
        self._decoder = Decoder()
        self._on_gap(Gap(wanted, offset))

    def _on_attached(self) -> None:
        """A new body begins."""

    async def _ask_for_ending(self, body_end: int | None = None) -> None:
        """Of a stream that is over and has nothing to read: it holds no event (204), or `body_end`
        is where it ends."""
        _, body = await self._transport.fetch_once(lookup_request([self.conversation_id]))
        infos = parse_lookup(self._transport.base_url, body)
        info = next((each for each in infos if each.conversation_id == self.conversation_id), None)
        if info is None:
            raise gone_error()
        if self.epoch not in (None, info.epoch):
            raise replaced_error(info.epoch)
        # A newer one has just begun, or a proxy cut the answer short.
        if info.is_live or body_end not in (None, info.end_offset):
            raise UnreachableError("the answer ended before the stream did")
        self.epoch = info.epoch
        self._ending = (info.state, info.reason)  # type: ignore[assignment]
        self._detach()


class EventStream(Stream[Event]):
    """``async for event in stream``; made by :meth:`Client.attach` and :meth:`Client.submit`."""

    def _on_attached(self) -> None:
        # Half an event that came before the loss comes again, whole.
        self._decoder = Decoder()

    def _take(self, block: bytes, items: list[Event | Comment]) -> bool:
        before = self._next_offset
        for item in items:
            if isinstance(item, Event):
                end = item.offset
                if end is None:
                    end = self._next_offset
                elif self._next_offset is not None and end <= self._next_offset:
                    continue  # was here before
                self._next_offset = end
                self._ready.append((item, end))
        return self._next_offset != before


class ByteStream(Stream[bytes]):
    """``async for block in stream``: the log's bytes; made by :meth:`Client.read_log`."""

    def _take(self, block: bytes, items: list[Event | Comment]) -> bool:
        assert self._next_offset is not None
        self._next_offset += len(block)
        self._ready.append((block, self._next_offset))
        return True
