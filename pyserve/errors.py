"""Every error pyserve raises or tells a client, in one place.

::

    PyserveError
    ├── ConfigError            a setting that cannot work; raised before anything is started
    ├── MissingExtraError      an optional part is not installed; names the extra
    └── ApiError               something a client is told: status, type, reason, figures

    from the core, raised where sessions are used as a library:
    ForkedProcessError         the manager was made before fork()
    MemoryBudgetError          live sessions fill the memory budget
    SessionEndedError          append() after the end (the reader pressed Stop, for example)
    EventTooLargeError         one event is larger than ``max_session_bytes``; and ended it
    EventUnfinishedError       append_event() in the middle of an event begun by append()

What a client is told never contains an exception's text: fixed messages, and figures of the
client's own request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from pyserve._core import (
    EventTooLargeError,
    EventUnfinishedError,
    ForkedProcessError,
    MemoryBudgetError,
    SessionEndedError,
)

__all__ = [
    "REASONS",
    "ApiError",
    "ConfigError",
    "Dialect",
    "EventTooLargeError",
    "EventUnfinishedError",
    "ForkedProcessError",
    "MemoryBudgetError",
    "MissingExtraError",
    "PyserveError",
    "SessionEndedError",
    "error_type",
]

#: How a stream tells an error: as an OpenAI chunk, or as Anthropic's named event.
Dialect = Literal["openai", "anthropic"]


class PyserveError(Exception):
    """The root of pyserve's own errors."""


class ConfigError(PyserveError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class MissingExtraError(PyserveError, ImportError):
    """An optional part is not installed."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs an optional part: pip install 'pyserve[{extra}]'")


@dataclass(frozen=True)
class Reason:
    """What a reason stands for: the HTTP status, and the fixed message that a client reads."""

    status: int
    message: str


#: The closed list of reasons. ``reason`` in an error is always one of these keys.
REASONS: dict[str, Reason] = {
    # the request
    "invalid_body": Reason(400, "The request body is not a valid JSON object"),
    "invalid_conversation_id": Reason(
        400,
        "A conversation id is 1 to 255 bytes of UTF-8 without control characters, not '.' or '..'",
    ),
    "invalid_parameter": Reason(400, "A request parameter is not valid"),
    "invalid_offset": Reason(
        400, "A position is a number of bytes, an event id <epoch>-<offset>, or 'earliest'"
    ),
    "body_too_large": Reason(413, "The request body is too large"),
    "idempotency_mismatch": Reason(422, "This Idempotency-Key was used with another request body"),
    "not_found": Reason(404, "There is nothing at this address"),
    "method_not_allowed": Reason(405, "This address does not take this method"),
    # the stream
    "job_not_found": Reason(404, "Job not found or expired"),
    "stream_not_found": Reason(404, "Stream not found or expired"),
    "offset_lost": Reason(400, "Stream offset lost, please restart"),
    "offset_ahead": Reason(400, "The position is beyond the end of the stream"),
    "stream_replaced": Reason(409, "The stream was replaced by a newer one"),
    "epoch_mismatch": Reason(412, "The conversation holds another stream than If-Match names"),
    "session_active": Reason(409, "The conversation has a live stream"),
    "replaced": Reason(409, "The generation was replaced by a newer one before it began"),
    "cancelled": Reason(400, "The generation was cancelled before it began"),
    "event_too_large": Reason(502, "An event is larger than the stream may be"),
    "memory_budget": Reason(503, "Live streams fill the memory budget, try again later"),
    # the upstream
    "upstream_unreachable": Reason(502, "The upstream cannot be reached"),
    "upstream_invalid": Reason(502, "The upstream's answer is not valid"),
    "upstream_auth": Reason(502, "The upstream refused the server's credentials"),
    "upstream_error": Reason(502, "The upstream answered with an error"),
    "upstream_not_sse": Reason(502, "The upstream's answer is not an event stream"),
    "upstream_lost": Reason(502, "The connection to the upstream was lost"),
    "upstream_timeout": Reason(504, "The upstream was silent for too long"),
    "context_overflow": Reason(400, "The request does not fit into the model's context"),
    "model_loading": Reason(503, "The model is loading, try again soon"),
    # admission
    "model_not_found": Reason(404, "There is no such model"),
    "model_unhealthy": Reason(503, "The model's upstream is not healthy, try again soon"),
    "model_unloaded": Reason(503, "The model was unloaded before the generation was over"),
    "queue_full": Reason(429, "Too many generations are waiting, try again later"),
    "owner_limit": Reason(429, "Too many of your generations are waiting, try again later"),
    "priority_too_high": Reason(403, "This priority is higher than you may ask for"),
    "request_timeout": Reason(504, "The generation took longer than one may"),
    "too_many_connections": Reason(503, "Too many requests are being answered, try again later"),
    # the administration of models
    "admin_key_required": Reason(401, "The administration needs its key: Authorization: Bearer"),
    "invalid_model": Reason(400, "This is not the configuration of a model"),
    "model_exists": Reason(409, "There is a model of this name, swap it"),
    "model_busy": Reason(409, "The model is being loaded or swapped"),
    "model_load_failed": Reason(502, "The model cannot serve, nothing was changed"),
    # the server
    "generation_failed": Reason(500, "The generation failed"),
    "shutdown": Reason(503, "The server is shutting down"),
    "internal_error": Reason(500, "Internal server error"),
}

#: Reasons of endings that are no errors, as lookups show them.
ENDING_REASONS: dict[str, str] = {
    "cancelled": "stopped by a client",
    "abandoned": "stopped, since nobody read it for too long",
    "max_runtime": "stopped, since it ran longer than its job allows",
    "replaced": "a newer generation took its place",
    "unterminated": "complete, but the upstream sent no terminator such as `data: [DONE]`",
    # a job that is complete, in the upstream's words
    "stop": "the model ended its answer",
    "length": "the answer reached its limit of tokens",
    "tool_calls": "the model waits for what its tools tell",
    "content_filter": "the upstream withheld the rest",
}

_TYPES_BY_STATUS = {
    401: "authentication_error",
    403: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    412: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "upstream_error",
}


def error_type(status: int) -> str:
    """The ``type`` of an error by its HTTP status."""
    fallback = "invalid_request_error" if status < 500 else "upstream_error"
    return _TYPES_BY_STATUS.get(status, fallback)


class ApiError(PyserveError):
    """Something a client is told: a JSON answer, or an event in a stream that has begun.

    ``reason`` is a key of :data:`REASONS`, which gives ``status`` and ``message`` unless an
    upstream's own are passed on. ``figures`` stand beside the reason in the answer.
    """

    def __init__(
        self,
        reason: str,
        message: str | None = None,
        *,
        status: int | None = None,
        retry_after_s: int | None = None,
        **figures: Any,
    ) -> None:
        known = REASONS[reason]
        self.reason = reason
        self.status = known.status if status is None else status
        self.message = known.message if message is None else message
        self.type = error_type(self.status)
        self.retry_after_s = retry_after_s
        self.figures = figures
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """The one shape of an error: ``{"error": {"code", "type", "message", "reason", ...}}``."""
        return {
            "error": {
                **self.figures,
                "code": self.status,
                "type": self.type,
                "message": self.message,
                "reason": self.reason,
            }
        }

    def to_event(self, dialect: Dialect) -> bytes:
        """The SSE text that tells the error inside a stream, one whole event."""
        if dialect == "anthropic":
            payload = orjson.dumps({"type": "error", **self.to_dict()})
            return b"event: error\ndata: " + payload + b"\n\n"
        return b"data: " + orjson.dumps(self.to_dict()) + b"\n\n"
