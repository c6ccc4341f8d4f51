"""The client itself: what it can do, each in a few lines."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self, TypeVar

import aiohttp
import orjson

from pyserve.client.errors import NotPyserveError
from pyserve.client.lookup import StreamInfo, lookup_request, parse_lookup
from pyserve.client.streams import ByteStream, Connection, EventStream, Gap, Stream
from pyserve.client.transport import Authorize, Limits, Request, Transport
from pyserve.errors import ApiError
from pyserve.positions import START, Position, parse_position

S = TypeVar("S", bound=Stream[Any])


class Client:
    """A client of one pyserve; ``async with Client(url) as client``.

    `base_url` may have a path, where pyserve is mounted under one. `headers` go with every request;
    `authorize` makes more of them for each (see :data:`Authorize`). A `session` of one's own (for
    TLS settings, a proxy) is used, not closed.

    All times are in seconds. `stall_timeout_s`: silence after which a connection counts as lost;
    the default is three missed heartbeats of the server's default; None waits for ever.
    `answer_timeout_s`: until an answer's head, a large request's upload included; a server holds a
    POST's back for 2 s by default.
    `give_up_after_s`: how long tries may fail in a row, without an event in between, before the
    last failure is raised. Pauses that the server asks for by ``Retry-After`` don't count, up to as
    much again: after twice this time it is over in any case.
    `first_delay_s` and `max_delay_s` bound the pause before a new try, which doubles each time; a
    ``Retry-After`` is added to it.

    What is tried again: whatever was not answered, and on a GET every 408, 425, 429 and 5xx. Once a
    stream was attached only pyserve's own words end it; another's 401, 404 or login page is a
    proxy's in between, and passes. Before, they are raised at once, as is a refusal of the very
    first connection. A POST without an answer is sent again with the same ``Idempotency-Key``; one
    that was answered 429 or 503 only if the answer has a ``Retry-After``.

    After :meth:`close` all methods raise RuntimeError.

    Raises:
        ValueError: `base_url` is not a plain ``http://`` or ``https://`` URL.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        authorize: Authorize | None = None,
        session: aiohttp.ClientSession | None = None,
        stall_timeout_s: float | None = 3.5,
        answer_timeout_s: float = 10.0,
        give_up_after_s: float = 60.0,
        first_delay_s: float = 0.25,
        max_delay_s: float = 10.0,
    ) -> None:
        limits = Limits(
            stall_timeout_s, answer_timeout_s, give_up_after_s, first_delay_s, max_delay_s
        )
        self._transport = Transport(base_url, limits, dict(headers or {}), authorize, session)
        self._streams: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()

    @property
    def base_url(self) -> str:
        """Where the server is."""
        return self._transport.base_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Detach every stream and close the connections. The generations go on."""
        for stream in list(self._streams):
            await stream.close()
        await self._transport.close()

    def _kept(self, stream: S) -> S:
        self._transport.require_open()
        self._streams.add(stream)
        return stream

    def attach(
        self,
        conversation_id: str,
        *,
        from_: str | int = 0,
        on_gap: Callable[[Gap], None] | None = None,
        on_connection: Callable[[Connection], None] | None = None,
    ) -> EventStream:
        """Read a conversation's stream: ``async for event in client.attach("chat-1")``.

        `from_` is an event id, an offset in bytes or ``"earliest"``. Bytes that the log's cap has
        pushed out raise :class:`OffsetLostError`; with `on_gap` the oldest event that is kept
        comes next, and `on_gap` is told what is missing. `on_connection` hears of every attach and
        loss. Nothing is sent before the first event is asked for; the iteration raises
        :class:`ClientError`.

        Raises:
            ValueError: `from_` is not a position.
        """
        start = _position(from_)
        return self._kept(
            EventStream(self._transport, conversation_id, start, on_gap, on_connection)
        )

    def read_log(
        self,
        conversation_id: str,
        *,
        from_: str | int = 0,
        on_gap: Callable[[Gap], None] | None = None,
        on_connection: Callable[[Connection], None] | None = None,
    ) -> ByteStream:
        """Like :meth:`attach`, for the log's bytes as they are, heartbeats included."""
        start = _position(from_)
        return self._kept(
            ByteStream(self._transport, conversation_id, start, on_gap, on_connection)
        )

    def submit(
        self,
        request: Mapping[str, Any],
        conversation_id: str | None = None,
        *,
        path: str = "/v1/chat/completions",
        idempotency_key: str | None = None,
        on_conflict: Literal["replace", "reject", "attach"] = "replace",
        on_gap: Callable[[Gap], None] | None = None,
        on_connection: Callable[[Connection], None] | None = None,
    ) -> EventStream:
        """Start a generation and read it: ``async for event in client.submit({...})``.

        `request` is the JSON body that the route at `path` takes; ``"stream"`` is added. Without a
        `conversation_id` a random one is made: see the result's ``conversation_id``. An
        idempotency key, random by default, goes with the POST, so that one which is repeated after
        a loss reads the generation it began instead of beginning another. `on_conflict` says what
        a live stream of the conversation means (the header ``X-Stream-Conflict``).
        """
        conversation_id = conversation_id or uuid.uuid4().hex
        opening = Request(
            "POST",
            "/" + path.lstrip("/"),
            conversation_id,
            headers={
                "Content-Type": "application/json",
                "Idempotency-Key": idempotency_key or uuid.uuid4().hex,
                "X-Stream-Conflict": on_conflict,
            },
            body=orjson.dumps({**request, "stream": True}),
        )
        return self._kept(
            EventStream(self._transport, conversation_id, START, on_gap, on_connection, opening)
        )

    async def stop(
        self, conversation_id: str, *, keep: bool = False, epoch: str | None = None
    ) -> None:
        """Stop the generation and drop its log; with `keep` the log can be read until it expires.

        Without effect where there is no such stream. With `epoch` only that stream is stopped, and
        never a newer one that began in the same moment.

        Raises:
            ReplacedError: another stream than `epoch` is there.
            ClientError: see :mod:`pyserve.client.errors`.
        """
        request = Request(
            "DELETE",
            "/v1/stream",
            conversation_id,
            query={"keep": "true"} if keep else {},
            headers={"If-Match": f'"{epoch}"'} if epoch else {},
        )
        status, _ = await self._transport.fetch(request)
        if status != 204:
            raise NotPyserveError(f"{self.base_url} is not a pyserve")

    async def lookup(self, conversation_ids: Iterable[str]) -> list[StreamInfo]:
        """The streams there are of these conversations (at most 10,000), and of ``<id>::<suffix>``.

        Raises:
            ClientError: see :mod:`pyserve.client.errors`.
        """
        _, body = await self._transport.fetch(lookup_request(list(conversation_ids)))
        return parse_lookup(self.base_url, body)


def _position(text: str | int) -> Position:
    try:
        return parse_position(str(text))
    except ApiError:
        raise ValueError(
            f"{text!r} is not an offset, an event id <epoch>-<offset> or 'earliest'"
        ) from None
