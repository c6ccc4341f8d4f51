"""The async face of the core: make sessions, append to them, read them, end them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from pyserve import _core
from pyserve.config import Config
from pyserve.errors import REASONS, ApiError, SessionEndedError
from pyserve.positions import START, Position, parse_position
from pyserve.wakeups import running_loop_waker

log = logging.getLogger("pyserve")

#: Bytes handed over in one read at most: what one chunk of the log holds.
READ_BYTES = 64 * 1024

# With its id and the last line it must fit into the smallest log that may be set, 4 KiB.
_MAX_ERROR_EVENT_BYTES = 3 * 1024

#: Who owns a session where nobody is told apart.
SINGLE_OWNER = ""

MAX_CONVERSATION_ID_BYTES = 255

# Stands between a conversation's id and a subkey, as in the core: no id holds it.
_SUBKEY_SEPARATOR = "\x1f"

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_REASON = re.compile(r"[a-z0-9_]{1,64}")


def is_conversation_id(text: str) -> bool:
    """Whether `text` may name a conversation: 1 to 255 bytes of UTF-8, no control characters, not
    ``.`` or ``..`` (which clients resolve away in a path)."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return False
    return (
        1 <= length <= MAX_CONVERSATION_ID_BYTES
        and text not in (".", "..")
        and not _CONTROL_CHARACTERS.search(text)
    )


@dataclass(frozen=True)
class Ending:
    """How a session is about to end, for its dialect to tell."""

    #: ``completed``, ``failed`` or ``cancelled``
    state: str
    reason: str
    #: of a failed one
    error: ApiError | None = None


#: A dialect: makes the last event of a stream, whoever ends it; ``b""`` where it has no word for
#: such an ending. It may be called for an ending that another one forestalls.
TellEnding = Callable[["StreamSession", Ending], bytes]


def _tell_openai(_session: StreamSession, ending: Ending) -> bytes:
    return b"" if ending.error is None else _bounded(ending.error).to_event("openai")


def _tell_anthropic(_session: StreamSession, ending: Ending) -> bytes:
    return b"" if ending.error is None else _bounded(ending.error).to_event("anthropic")


def _bounded(error: ApiError) -> ApiError:
    """`error`, without an upstream's own words where they would fill the smallest log."""
    if len(error.to_event("anthropic")) <= _MAX_ERROR_EVENT_BYTES:
        return error
    return ApiError(error.reason, status=error.status)


class SessionReader:
    """A place in a session that moves forward: ``async for block in reader``.

    Blocks are runs of log bytes, at most 64 KiB each. The iteration ends when the session is over
    and everything was read. It raises :class:`ApiError`, reason ``offset_lost``, when the next byte
    was dropped from the front of the log before it was read. The reader counts among the session's
    readers until it ends, is closed, or is garbage.
    """

    def __init__(self, session: StreamSession, core_reader: _core.SessionReader) -> None:
        self.session = session
        self._core_reader = core_reader

    @property
    def offset(self) -> int:
        """The offset of the next byte."""
        return self._core_reader.offset

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while (block := self.read_ready()) is None:
            await running_loop_waker().wait_readable(self._core_reader)
        if not block:
            self.close()
            raise StopAsyncIteration
        return block

    def read_ready(self) -> bytes | None:
        """What can be read without waiting: a block, ``b""`` at the end, None if nothing is new.

        Raises:
            ApiError: reason ``offset_lost``.
        """
        try:
            return self._core_reader.read(READ_BYTES)
        except _core.OffsetLostError:
            raise self.session.offset_error("offset_lost") from None

    def hand_over(
        self, pump: _core.SocketPump, socket: int, done: _core.Wakeup, token: int
    ) -> _core.Delivery:
        """Let `pump` send the rest to `socket`. This reader stays where it is, and counted.

        Raises:
            OSError: no descriptor is left.
        """
        return pump.attach(self.session._core, self.offset, socket, done, token)

    def close(self) -> None:
        """Stop reading. Closing twice does nothing."""
        self._core_reader.detach()


class StreamSession:
    """One generation's log. All methods but the reading are synchronous and may be called from any
    thread; hooks run on the thread that ends the session.

    Objects of this class are views: two of them with the same epoch are the same session.
    """

    __slots__ = ("_core", "manager")

    def __init__(self, core: _core.StreamSession, manager: StreamSessionManager) -> None:
        self._core = core
        self.manager = manager

    def __repr__(self) -> str:
        return f"<StreamSession {self.conversation_id!r} {self.epoch} {self.state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StreamSession) and self._core is other._core

    def __hash__(self) -> int:
        return hash(self.epoch)

    @property
    def owner(self) -> str:
        """Who created the session."""
        return self._core.owner

    @property
    def conversation_id(self) -> str:
        """The client's name for the stream."""
        return self.key.partition(_SUBKEY_SEPARATOR)[0]

    @property
    def key(self) -> str:
        """What the manager knows it by: the conversation id, and a subkey if it has one."""
        return self._core.conversation_id

    @property
    def epoch(self) -> str:
        """Tells two sessions of one conversation apart."""
        return self._core.epoch

    @property
    def tag(self) -> bytes:
        """What the creator attached; lives as long as the log."""
        return self._core.tag.partition(b"\n")[2]

    @property
    def dialect(self) -> str:
        """How the stream tells its ending: a name in the manager's ``dialects``."""
        return self._core.tag.partition(b"\n")[0].decode()

    def snapshot(self) -> _core.SessionSnapshot:
        """State, offsets, readers and times of one moment, together."""
        return self._core.snapshot()

    @property
    def state(self) -> str:
        """``queued``, ``streaming``, ``completed``, ``failed`` or ``cancelled``."""
        return self.snapshot().state

    @property
    def is_live(self) -> bool:
        """Whether more may come."""
        return self.snapshot().is_live

    @property
    def total_size(self) -> int:
        """Bytes written since the session's start, dropped ones included."""
        return self.snapshot().end_offset

    @property
    def dropped_prefix(self) -> int:
        """Bytes dropped from the front, which is the offset of the oldest byte kept."""
        return self.snapshot().first_offset

    # --- the producer's side

    def start(self) -> bool:
        """Say that the generation runs: ``queued`` becomes ``streaming``. append() does it too."""
        return self._core.start()

    def append(self, sse: str | bytes) -> None:
        """Append SSE text, split anywhere; an event is published when it is whole.

        Raises:
            SessionEndedError: the session is over.
            EventTooLargeError: an event exceeds ``max_session_bytes``; the session has failed.
            MemoryBudgetError: live sessions fill ``max_total_bytes``; this one has failed.
            UnicodeEncodeError: `sse` holds a lone surrogate. Nothing was appended.
        """
        if type(sse) is not bytes:
            sse = sse.encode() if isinstance(sse, str) else bytes(sse)
        self._guard_size(self._core.append, sse)

    def append_event(self, data: str, event: str | None = None) -> None:
        """Append one event: each line of `data` becomes a ``data:`` line.

        Raises:
            ValueError: `event` holds a line end or NUL.
            EventUnfinishedError: append() began an event that is not whole yet.
            SessionEndedError, EventTooLargeError, UnicodeEncodeError: as append().
        """
        if event is not None and re.search(r"[\r\n\0]", event):
            raise ValueError("an event's name cannot hold a line end or NUL")
        self._guard_size(self._core.append_event, data.encode(), (event or "").encode())

    def announce(self, data: str, event: str) -> None:
        """As append_event(), for what is told before the generation runs: queued stays queued."""
        self._guard_size(self._core.announce, data.encode(), event.encode())

    def offer(self, sse: bytes) -> None:
        """As append(), but what doesn't fit ends nothing here: it is the caller's matter.

        Raises:
            SessionEndedError, EventTooLargeError, MemoryBudgetError: as append().
        """
        self._core.append(sse)

    def end_input(self) -> None:
        """Publish an event that lacks only its blank line; drop one that broke off. finalize() of
        a completed session does it too.

        Raises:
            EventTooLargeError: with its id the event exceeds ``max_session_bytes``; the session has
                failed.
        """
        self._guard_size(self._core.end_input)

    def _guard_size(self, append: Callable[..., None], *args: bytes) -> None:
        try:
            append(*args)
        except _core.EventTooLargeError:
            self.fail(ApiError("event_too_large"))
            raise
        except _core.MemoryBudgetError:
            self.fail(ApiError("memory_budget"))
            raise

    def finalize(self, state: str = "completed", reason: str | None = None) -> bool:
        """End the session as ``completed`` or ``failed``; False if it had ended before.

        A failed one gets an error event that names `reason`, by default ``generation_failed``.

        Raises:
            ValueError: another state, or a reason that is not a word of ``[a-z0-9_]``.
            EventTooLargeError: as end_input().
        """
        if reason is not None and not _REASON.fullmatch(reason):
            raise ValueError(f"a reason is 1 to 64 characters of [a-z0-9_], not {reason!r}")
        if state == "completed":
            self.end_input()
            return self._end(Ending(state, reason or ""))
        if state != "failed":
            raise ValueError(f"state must be 'completed' or 'failed', not {state!r}")
        if reason is None or reason in REASONS:
            return self.fail(ApiError(reason or "generation_failed"))
        error = ApiError("generation_failed")
        error.reason = reason
        return self.fail(error)

    def fail(self, error: ApiError) -> bool:
        """End the session as failed: `error` becomes the last event. False if it had ended."""
        return self._end(Ending("failed", error.reason, error))

    def _end(self, ending: Ending) -> bool:
        if not self.is_live:
            return False
        last_event = self.manager.dialects[self.dialect](self, ending)
        if ending.state == "cancelled":
            return self._core.cancel(ending.reason, last_event)
        return self._core.finalize(ending.state, ending.reason, last_event)

    def __enter__(self) -> Self:
        """``with session:`` around a producer ends the session with it, whatever happens."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        """Completed; failed if an exception came; a Stop in between is no exception."""
        if error is None:
            self.finalize()
        elif isinstance(error, SessionEndedError) and not self.is_live:
            return True
        else:
            self.finalize("failed")
        return False

    def cancel(self, reason: str = "cancelled") -> bool:
        """End the session as cancelled and call its ``on_cancel``. The log stays until its TTL."""
        return self._end(Ending("cancelled", reason))

    def last_event(self) -> bytes:
        """The newest event of the log, ``b""`` if there is none or it was dropped."""
        snapshot = self.snapshot()
        reader = self._core.attach(snapshot.last_event_start)
        event = b""
        try:
            while left := snapshot.last_event_end - reader.offset:
                event += reader.read(left) or b""
        except _core.OffsetLostError:
            return b""
        return event

    # --- the readers' side

    def offset_error(self, reason: str) -> ApiError:
        """An error about a position, with the figures a client needs to start again."""
        now = self.snapshot()
        return ApiError(
            reason, first_offset=now.first_offset, end_offset=now.end_offset, epoch=self.epoch
        )

    def resolve(self, position: Position) -> int:
        """The offset that `position` means in this session.

        Raises:
            ApiError: reason ``stream_replaced``, ``offset_lost`` or ``offset_ahead``.
        """
        if position.epoch is not None and position.epoch != self.epoch:
            raise ApiError("stream_replaced", epoch=self.epoch)
        now = self.snapshot()
        if position.offset is None:
            return now.first_offset
        if position.offset < now.first_offset:
            raise self.offset_error("offset_lost")
        if position.offset > now.end_offset:
            raise self.offset_error("offset_ahead")
        return position.offset

    def read_from(self, position: Position | str | int = START) -> SessionReader:
        """Read from a position on: an offset, an event id, ``"earliest"``, or 0 by default.

        Raises:
            ApiError: ``invalid_offset``, or as :meth:`resolve`.
        """
        if not isinstance(position, Position):
            position = parse_position(str(position))
        return SessionReader(self, self._core.attach(self.resolve(position)))


Hook = Callable[[], Any]


class StreamSessionManager:
    """All sessions of a process, by (owner, conversation id).

    ``run()`` must be running somewhere for heartbeats and collection: :func:`pyserve.setup` and
    :func:`pyserve.create_app` see to that.
    """

    def __init__(self, config: Config | None = None, *, clock: _core.Clock | None = None) -> None:
        self.config = config or Config()
        #: How streams tell their endings, by the name that their sessions carry.
        self.dialects: dict[str, TellEnding] = {
            "openai": _tell_openai,
            "anthropic": _tell_anthropic,
        }
        self._core = _core.StreamSessionManager(
            max_session_bytes=self.config.max_session_bytes,
            max_total_bytes=self.config.max_total_bytes,
            ttl_s=self.config.session_ttl_s,
            heartbeat_interval_s=self.config.heartbeat_interval_s,
            clock=clock,
        )

    def __len__(self) -> int:
        return len(self._core)

    @property
    def used_bytes(self) -> int:
        """Memory that counts towards ``max_total_bytes``."""
        return self._core.used_bytes

    def create_or_replace(
        self,
        conversation_id: str,
        *,
        owner: str = SINGLE_OWNER,
        subkey: str = "",
        on_cancel: Hook | None = None,
        on_end: Callable[[StreamSession], Any] | None = None,
        dialect: str = "openai",
        tag: bytes = b"",
    ) -> StreamSession:
        """A new session. A live one of the same conversation is cancelled, reason ``replaced``.

        One with a `subkey` stands beside the conversation's own: :meth:`newest` takes the one with
        the last subkey for the youngest of them.

        `on_cancel` is called once if the session is cancelled (DELETE, or replaced), to stop
        whatever produces; `on_end` once at every kind of ending, with the session.

        Raises:
            ApiError: reason ``invalid_conversation_id``.
            MemoryBudgetError: live sessions fill ``max_total_bytes``.
        """
        if not is_conversation_id(conversation_id):
            raise ApiError("invalid_conversation_id")
        session: StreamSession
        # A hook of the replaced session, or another thread, may end the new one before it is known
        # here: whichever comes second, the ending or the session, calls on_end.
        arrivals = itertools.count()

        def call_on_end() -> None:
            if next(arrivals) and on_end is not None:
                _call_guarded(lambda: on_end(session))

        def call_on_cancel() -> None:
            if on_cancel is not None:
                _call_guarded(on_cancel)

        core = self._core.create_or_replace(
            owner,
            conversation_id + _SUBKEY_SEPARATOR + subkey if subkey else conversation_id,
            call_on_cancel if on_cancel else None,
            call_on_end if on_end else None,
            dialect.encode() + b"\n" + tag,
        )
        session = StreamSession(core, self)
        call_on_end()
        return session

    def get(self, conversation_id: str, *, owner: str = SINGLE_OWNER) -> StreamSession | None:
        """The conversation's session, live or kept after its end; None if there is none."""
        return self._view(self._core.get(owner, conversation_id))

    def newest(self, conversation_id: str, *, owner: str = SINGLE_OWNER) -> StreamSession | None:
        """The youngest of the conversation's sessions, those with subkeys included."""
        return self._view(self._core.newest(owner, conversation_id))

    def sessions_of(
        self, conversation_id: str, *, owner: str = SINGLE_OWNER
    ) -> list[StreamSession]:
        """The conversation's own session, if there is one, and those with subkeys in order."""
        found = self.lookup([conversation_id], owner=owner)
        return [session for session in found if session.conversation_id == conversation_id]

    def lookup(
        self, conversation_ids: Iterable[str], *, owner: str = SINGLE_OWNER
    ) -> list[StreamSession]:
        """Sessions whose conversation is one of these or begins with one of these and ``::``."""
        # Each once: a repeated id would be looked up, and all that it finds gone through, again.
        wellformed = [text for text in dict.fromkeys(conversation_ids) if is_conversation_id(text)]
        found = self._core.lookup(owner, wellformed)
        return [StreamSession(core, self) for core in found]

    def evict(
        self, conversation_id: str, *, owner: str = SINGLE_OWNER, epoch: str = ""
    ) -> StreamSession | None:
        """Drop the log: nobody can attach any more. A live generation goes on for its readers."""
        return self._view(self._core.evict(owner, conversation_id, epoch))

    def evict_and_cancel(
        self, conversation_id: str, *, owner: str = SINGLE_OWNER, epoch: str = ""
    ) -> StreamSession | None:
        """Stop the generation and drop the log; with `epoch` only if it is that session's."""
        session = self.evict(conversation_id, owner=owner, epoch=epoch)
        if session is not None:
            session.cancel()
        return session

    def _view(self, core: _core.StreamSession | None) -> StreamSession | None:
        return None if core is None else StreamSession(core, self)

    def fail_live(self, error: ApiError) -> None:
        """End every live session with `error`."""
        for core in self._core.live_sessions():
            StreamSession(core, self).fail(error)

    async def run(self) -> None:
        """Send heartbeats and collect expired logs until cancelled."""
        longest_s = self.config.heartbeat_interval_s
        while True:
            due_in_s = self._core.tick()
            # A session made while we sleep is due one interval later: never before we wake.
            await asyncio.sleep(longest_s if due_in_s is None else min(due_in_s, longest_s))


def _call_guarded(hook: Hook) -> None:
    """A hook's failure is the application's bug to log; it must not undo a Stop."""
    try:
        hook()
    except Exception:
        log.exception("a session's hook failed")
