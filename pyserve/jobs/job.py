"""A job: what is known of it, and its log of named events.

The log holds the events, and drops its oldest as every log does. The record holds the answer's text
once more, without what makes events of it, so that a job's answer can be had without its stream: a
thirtieth of the log's size, and bounded by the same limit.
"""

from __future__ import annotations

import secrets
import threading
import time
from contextlib import suppress
from typing import Any

import orjson

from pyserve.errors import (
    ApiError,
    EventTooLargeError,
    MemoryBudgetError,
    SessionEndedError,
)
from pyserve.jobs.request import JobRequest
from pyserve.sessions import Ending, StreamSession

#: What a session's state is called when the session is a job's.
_STATUSES = {
    "queued": "queued",
    "streaming": "running",
    "completed": "done",
    "cancelled": "cancelled",
    "failed": "error",
}

_LAST_EVENTS = {"completed": "job_complete", "cancelled": "job_cancelled", "failed": "job_error"}


#: An owner, his key, and the conversation that he named.
IdempotencyScope = tuple[str, str, str | None]


class Text:
    """A text that grows at its end, and gives up its beginning where it is too long."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._utf8 = bytearray()
        self.is_truncated = False

    def add(self, text: str) -> None:
        """Add to the end."""
        self._utf8 += text.encode()
        excess = len(self._utf8) - self._max_bytes
        if excess > 0:
            self.is_truncated = True
            del self._utf8[:excess]

    def __str__(self) -> str:
        return self._utf8.decode(errors="ignore")  # the cut may be within a character


class Output:
    """The answer so far."""

    def __init__(self, max_bytes: int) -> None:
        self.text = Text(max_bytes)
        self.reasoning = Text(max_bytes)
        #: whole ones, as the model asked for them
        self.tool_calls: list[dict[str, Any]] = []
        self._room_for_calls = max_bytes
        self._calls_left_out = False

    def add_tool_call(self, call: dict[str, Any]) -> None:
        """One more, while there is room."""
        self._room_for_calls -= len(orjson.dumps(call))
        self._calls_left_out = self._room_for_calls < 0
        if not self._calls_left_out:
            self.tool_calls.append(call)

    def describe(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "text": str(self.text),
            "reasoning": str(self.reasoning),
            "tool_calls": self.tool_calls,
            "truncated": self.text.is_truncated
            or self.reasoning.is_truncated
            or self._calls_left_out,
        }


class Metrics:
    """Times of one job, measured here; all on the clock that never jumps but what people read."""

    def __init__(self) -> None:
        self._created = time.monotonic()
        self._started: float | None = None
        self._first_token: float | None = None
        self._last_token = 0.0
        self._ended: float | None = None
        self.tokens = 0
        #: Unix seconds
        self.started_at: float | None = None
        self.first_token_at: float | None = None

    def start(self) -> None:
        """It has its slot."""
        self._started = time.monotonic()
        self.started_at = _unix_now()

    def count_token(self) -> None:
        """One more."""
        self._last_token = time.monotonic()
        if self._first_token is None:
            self._first_token = self._last_token
            self.first_token_at = _unix_now()
        self.tokens += 1

    def end(self) -> None:
        """It is over; the first call counts."""
        if self._ended is None:
            self._ended = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """As JSON shows them. Times count from the job's submission; null: not yet, or never."""
        queued_until = self._started or self._ended or time.monotonic()
        return {
            "queue_ms": _milliseconds(queued_until - self._created),
            "ttft_ms": None
            if self._first_token is None
            else _milliseconds(self._first_token - self._created),
            "tokens": self.tokens,
            "tokens_per_second": self._tokens_per_second(),
        }

    def _tokens_per_second(self) -> float | None:
        """Between the first token and the last: what came after the first, by the time it took."""
        if self._first_token is None or self._last_token <= self._first_token:
            return None
        return round((self.tokens - 1) / (self._last_token - self._first_token), 2)


def _unix_now() -> float:
    """In whole milliseconds, as the core tells its times: so that they keep their order."""
    return int(time.time() * 1000) / 1000


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


class Job:
    """One job. Its log outlives it nowhere: a job whose log is gone is gone, too."""

    def __init__(self, job_id: str, owner: str, request: JobRequest, max_output_bytes: int) -> None:
        self.id = job_id
        self.owner = owner
        self.conversation_id = request.conversation_id or f"conv_{secrets.token_hex(12)}"
        #: None as soon as nobody needs it any more
        self.request: JobRequest | None = request
        #: under which a repeat finds it
        self.scope: IdempotencyScope | None = None
        #: as it was asked for; once it runs, the model's own name
        self.model = request.model
        #: where its log is: the manager's key, and the session's epoch
        self.key = ""
        self.epoch = ""
        self.position: int | None = None
        self.told_position: int | None = None
        self.output = Output(max_output_bytes)
        self.metrics = Metrics()
        self.usage: dict[str, Any] | None = None
        self._error: ApiError | None = None

    def start(self, model: str) -> None:
        """It has its slot, at a version of this model."""
        self.model = model
        self.metrics.start()

    def last_event(self, ending: Ending) -> bytes:
        """The one event that tells its end."""
        self.metrics.end()
        if ending.error is not None:
            self._error = _bare(ending.error)
        return format_event(
            _LAST_EVENTS[ending.state],
            {
                "job_id": self.id,
                "reason": ending.reason or None,
                "metrics": self.metrics.describe(),
            },
        )

    def describe_briefly(self, log: StreamSession) -> dict[str, Any]:
        """What its submission is told."""
        status = _STATUSES[log.state]
        return {
            "job_id": self.id,
            "conversation_id": self.conversation_id,
            "status": status,
            "queue_position": self.position if status == "queued" else None,
        }

    def describe(self, log: StreamSession) -> dict[str, Any]:
        """All about it, in JSON's types. The log is what says how it stands."""
        now = log.snapshot()
        status = _STATUSES[now.state]
        return {
            "job_id": self.id,
            "conversation_id": self.conversation_id,
            "model": self.model,
            "status": status,
            "queue_position": self.position if status == "queued" else None,
            "created_at": now.started_at,
            "started_at": self.metrics.started_at,
            "first_token_at": self.metrics.first_token_at,
            "completed_at": now.completed_at or None,
            "reason": now.reason or None,
            "error": self._describe_error(now.reason) if status == "error" else None,
            "usage": self.usage,
            "output": self.output.describe(),
            "metrics": self.metrics.describe(),
        }

    def error(self, reason: str) -> ApiError:
        """The error that made it fail for `reason`."""
        # Of two that came at once, the log knows which was first.
        if self._error is not None and self._error.reason == reason:
            return self._error
        return ApiError(reason)

    def _describe_error(self, reason: str) -> Any:
        return self.error(reason).to_dict()["error"]


def _bare(error: ApiError) -> ApiError:
    """The same error without its traceback, whose frames would keep the log alive."""
    return ApiError(
        error.reason,
        error.message,
        status=error.status,
        retry_after_s=error.retry_after_s,
        **error.figures,
    )


def format_event(name: str, data: dict[str, Any]) -> bytes:
    """One named event, as SSE text."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


class JobLog:
    """Where a job's events go: its own log, and a stream of many jobs if it was posted to one."""

    def __init__(self, job_id: str, stream: StreamSession | None) -> None:
        self._job_id = job_id
        self._stream = stream
        self.session: StreamSession
        # Whoever ends the job may do so on any thread, between an event's two appends.
        self._lock = threading.RLock()

    def announce(self, name: str, /, **fields: Any) -> None:
        """Tell an event before the job runs.

        Raises:
            SessionEndedError, EventTooLargeError, MemoryBudgetError: the job is over.
        """
        data = {"job_id": self._job_id, **fields}
        with self._lock:
            self.session.announce(orjson.dumps(data).decode(), name)
            self._copy(format_event(name, data))

    def emit(self, name: str, /, **fields: Any) -> None:
        """Tell an event.

        Raises:
            SessionEndedError, EventTooLargeError, MemoryBudgetError: the job is over.
        """
        event = format_event(name, {"job_id": self._job_id, **fields})
        with self._lock:
            self.session.append(event)
            self._copy(event)

    def copy_last(self, event: bytes) -> None:
        """Copy the job's last event. Whatever room there is, the stream goes on."""
        with self._lock, suppress(SessionEndedError, EventTooLargeError, MemoryBudgetError):
            if self._stream is not None:
                self._stream.offer(event)
            self._stream = None

    def _copy(self, event: bytes) -> None:
        """A job that the stream has no room for fails; the stream and its other jobs do not."""
        if self._stream is None:
            return
        try:
            self._stream.offer(event)
        except SessionEndedError:
            self._stream = None  # deleted: the job goes on
        except EventTooLargeError:
            self.session.fail(ApiError("event_too_large"))
            raise
        except MemoryBudgetError:
            self.session.fail(ApiError("memory_budget"))
            raise
