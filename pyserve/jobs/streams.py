"""Streams of many jobs: one log for a page that reads them all over one connection."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field

from pyserve.errors import ApiError
from pyserve.jobs.job import format_event
from pyserve.sessions import Ending, StreamSession, StreamSessionManager

_DIALECT = "job_stream"
_SUBKEY = "stream"


@dataclass
class _JobStream:
    session: StreamSession
    left_at: float
    live_jobs: set[str] = field(default_factory=set)
    watch: asyncio.TimerHandle | None = None


class JobStreams:
    """Each lives until it is deleted, or nobody writes to it and nobody reads it for the TTL."""

    def __init__(self, manager: StreamSessionManager) -> None:
        self._manager = manager
        self._streams: dict[str, _JobStream] = {}
        self._stream_of_job: dict[str, _JobStream] = {}
        manager.dialects[_DIALECT] = _tell_ending

    def __len__(self) -> int:
        return len(self._streams)

    def create(self, owner: str) -> str:
        """A new stream's id.

        Raises:
            MemoryBudgetError: live sessions fill ``max_total_bytes``.
        """
        stream_id = f"stream_{secrets.token_hex(12)}"
        session = self._manager.create_or_replace(
            stream_id, owner=owner, subkey=_SUBKEY, dialect=_DIALECT, on_end=self._forget
        )
        session.start()
        stream = _JobStream(session, time.monotonic())
        self._streams[stream_id] = stream
        self._watch_idle(stream)
        return stream_id

    def get(self, stream_id: str, owner: str) -> StreamSession:
        """The log of a stream.

        Raises:
            ApiError: reason ``stream_not_found``: unknown, over, or somebody else's.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.session.owner != owner:
            raise ApiError("stream_not_found")
        return stream.session

    def join(self, session: StreamSession, job_id: str) -> None:
        """A job writes to this stream."""
        stream = self._streams.get(session.conversation_id)
        if stream is not None:
            stream.live_jobs.add(job_id)
            self._stream_of_job[job_id] = stream

    def leave(self, job_id: str) -> None:
        """The job is over. On any thread."""
        stream = self._stream_of_job.pop(job_id, None)
        if stream is not None:
            stream.left_at = time.monotonic()
            stream.live_jobs.discard(job_id)

    def _watch_idle(self, stream: _JobStream) -> None:
        ttl_s = self._manager.config.session_ttl_s
        idle_s = min(stream.session.snapshot().unread_s, time.monotonic() - stream.left_at)
        left_s = ttl_s if stream.live_jobs else ttl_s - idle_s
        if left_s > 0:
            loop = asyncio.get_running_loop()
            stream.watch = loop.call_later(left_s, self._watch_idle, stream)
            return
        session = stream.session
        self._manager.evict_and_cancel(session.key, owner=session.owner, epoch=session.epoch)

    def _forget(self, session: StreamSession) -> None:
        stream = self._streams.pop(session.conversation_id, None)
        if stream is not None and stream.watch is not None:
            stream.watch.cancel()


def _tell_ending(_session: StreamSession, ending: Ending) -> bytes:
    # Not "error", which is what EventSource calls a lost connection.
    return b"" if ending.error is None else format_event("stream_error", ending.error.to_dict())
